// RuntimeMemory: the buffers that the runtime works in, cut from one allocation.
//
//   full slots       full parameters of units in rotation: one in use, and those gathered ahead
//   full, kept       full parameters of units that rest unsharded, or that hold other units
//   block slots      node blocks between the two hops of a gather, in rotation
//   blocks, kept     node blocks of units that rest as block
//   gradient blocks  sums of reduce's hop 1 over micro-steps, where hop 2 runs once per step
//   flags            which parameters some rank used, for the sum of a boundary
//   reductions       per reduction in flight: a node block and gradients that have to be packed
//
// Beside it, where gradients have another dtype than their sums:
//   gradient sums    the sum of each unit's shard over micro-steps; the units own it
//
// Sizes follow from the units alone, so they are the same on every rank. What does not fit at run
// time (several units unsharded by hand, a gradient that must be packed unexpectedly) gets an
// allocation of its own, which is counted.
//
// Slots are taken and given back where the host program stands, never by the progress of a device:
// so all ranks decide alike. `Slot::free` orders the work.
//
// Memory and streams. torch's allocator gives memory out, and takes it back, in the order of
// compute: what it gives out, compute may still read; what it gets back, compute may write at once.
// The other streams must be ordered by hand, and this file is where it is done:
//   new memory     the stream that uses it first waits for compute as it was after the allocation;
//                  the functions below that may allocate take that stream
//   freed memory   is kept until the host sees that its last use is over
//
// Thread safety: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <vector>

#include "mics/prefetch.h"
#include "mics/stream.h"
#include "mics/unit.h"

namespace mics {

struct Slot {
  at::Tensor memory;            // [nbytes], bytes
  std::unique_ptr<Event> free;  // marked when its last reader is done
  bool is_taken = false;
  bool is_planned = true;  // false: an allocation of its own, freed when given back
  int64_t given_back = 0;  // when it was, in the order of the pool; 0: never used
  // The first `numel` elements of `dtype`.
  [[nodiscard]] at::Tensor as(at::ScalarType dtype, int64_t numel) const;
};

// Slots that units take turns to use.
class SlotPool {
 public:
  explicit SlotPool(Stream& compute) : compute_(compute) {}
  void add(at::Tensor memory);
  // The smallest free slot that fits; of several, the one given back longest ago: its last reader
  // is most likely done, so that filling it does not wait. Null when there is none.
  [[nodiscard]] Slot* take(int64_t nbytes);
  // A slot with memory of its own; `free` is marked on compute.
  [[nodiscard]] Slot* grow(int64_t nbytes, at::Device device);
  // `slot->free` is marked. The memory of a grown slot is freed when that is over.
  void give_back(Slot* slot);

 private:
  void free_passed();

  Stream& compute_;
  std::list<Slot> slots_;    // addresses stay
  std::list<Slot> retired_;  // grown ones that were given back
  int64_t num_given_back_ = 0;
};

// One part of the allocation, for reports.
struct MemoryPart {
  std::string name;
  int64_t count = 0;
  int64_t nbytes = 0;  // of all `count` together
};

class RuntimeMemory {
 public:
  // Allocates; memory of the units' communicators where they have a kind of their own. `compute`
  // makes the slots' events and outlives this. `num_flags`: int64 elements.
  RuntimeMemory(const std::vector<std::shared_ptr<Unit>>& units, const Depths& depths,
                Stream& compute, int64_t num_flags);
  RuntimeMemory(const RuntimeMemory&) = delete;
  RuntimeMemory& operator=(const RuntimeMemory&) = delete;

  // False when the units' settings have changed in a way that needs other memory.
  [[nodiscard]] bool is_planned_for(const std::vector<std::shared_ptr<Unit>>& units) const;
  // The memory came from the units' communicators and is not registered with them.
  [[nodiscard]] bool needs_registration() const { return is_of_backend_ && !is_registered_; }
  // Registers it; see Communicator::register_memory. Nothing may be in flight when the memory is
  // destroyed.
  void register_with(const std::vector<std::shared_ptr<Unit>>& units);

  [[nodiscard]] SlotPool& full_slots() { return full_slots_; }
  [[nodiscard]] SlotPool& block_slots() { return block_slots_; }
  // The unit's own slot; null when it shares those in rotation.
  [[nodiscard]] Slot* full_home(int unit) { return at(homes_, unit).full.get(); }
  [[nodiscard]] Slot* block_home(int unit) { return at(homes_, unit).block.get(); }
  // The unit's gradient block, [numel]; the same memory in each call with the same arguments.
  // `first`: the stream that uses it first, if it is new.
  [[nodiscard]] at::Tensor gradient_block(int unit, int64_t numel, at::ScalarType dtype,
                                          Stream& first) {
    return fit(at(homes_, unit).gradient_block, numel, dtype, first);
  }
  // Memory of reduction `index`: its node block, its packed gradients; [numel], valid until the
  // next call for the same index, at which compute has waited for its last use.
  [[nodiscard]] at::Tensor reduce_block(int index, int64_t numel, at::ScalarType dtype,
                                        Stream& first) {
    return fit(at(reductions_, index).block, numel, dtype, first);
  }
  [[nodiscard]] at::Tensor packed_gradients(int index, int64_t numel, at::ScalarType dtype) {
    return fit(at(reductions_, index).packed, numel, dtype, compute_);
  }
  // [num_flags], int64.
  [[nodiscard]] const at::Tensor& flags() const { return flags_; }
  // A full slot or block slot that is not in the plan.
  [[nodiscard]] Slot* grow_full(int64_t nbytes);
  [[nodiscard]] Slot* grow_block(int64_t nbytes);

  [[nodiscard]] const std::vector<MemoryPart>& parts() const { return parts_; }
  [[nodiscard]] int64_t nbytes() const { return nbytes_; }  // of the one allocation
  // Allocations that were not planned.
  [[nodiscard]] int64_t num_grown() const { return num_grown_; }
  [[nodiscard]] int64_t grown_nbytes() const { return grown_nbytes_; }

 private:
  class Cutter;
  struct Home {
    std::unique_ptr<Slot> full;
    std::unique_ptr<Slot> block;
    at::Tensor gradient_block;  // bytes
  };
  struct Reduction {
    at::Tensor block;   // bytes
    at::Tensor packed;  // bytes
  };
  // Ask `cutter` for slots and blocks of the units, and for what reductions work in.
  void plan_units(const std::vector<std::shared_ptr<Unit>>& units, const Depths& depths,
                  Cutter& cutter);
  void plan_reductions(const std::vector<std::shared_ptr<Unit>>& units, Cutter& cutter);
  // What decides the plan, per unit.
  using Key = std::vector<std::array<int64_t, 4>>;
  [[nodiscard]] static Key key_of(const std::vector<std::shared_ptr<Unit>>& units);
  template <typename T>
  static T& at(std::vector<T>& items, int index) {
    return items[static_cast<size_t>(index)];
  }
  [[nodiscard]] at::Tensor fit(at::Tensor& memory, int64_t numel, at::ScalarType dtype,
                               Stream& first);

  Stream& compute_;
  const std::unique_ptr<Event> allocated_;
  const at::Device device_;
  const Key key_;
  at::Tensor whole_;
  SlotPool full_slots_;
  SlotPool block_slots_;
  std::vector<Home> homes_;
  std::vector<Reduction> reductions_;
  at::Tensor flags_;
  std::vector<MemoryPart> parts_;
  int64_t nbytes_ = 0;
  int64_t num_grown_ = 0;
  int64_t grown_nbytes_ = 0;
  bool is_of_backend_ = false;
  bool is_registered_ = false;
  std::vector<std::shared_ptr<void>> registrations_;  // last: they go before the memory
};

}  // namespace mics
