// GatherPipeline: brings units' full parameters where modules use them, ahead of use.
//
//   shard --hop 1, gather_rail--> node block --hop 2, gather_intra--> full --finish--> module
//
//   start_rail(u)   hop 1 into a block            several units ahead
//   start_intra(u)  both hops into a full slot    the next unit
//   finish(u)       compute waits, the module gets the full parameters
//   reshard(u)      the module gets the sharded ones; memory goes back
//
// Each step starts the ones before it that are missing. What was gathered is used only while it is
// current (see Weights); else it is gathered again.
//
// State        full parameters                          next
// kNone        not gathered                             kStarted
// kStarted     on their way, for a recorded use         kInUse, kRetained; kNone when not used
// kRetained    on their way, by an explicit request     kInUse; kNone by reshard() alone
// kInUse       in the module; compute has waited        kKept, kResting, kNone, kRefreshing
// kRefreshing  in the module; newer ones on their way   kInUse, kStarted, kRetained, kNone
// kKept        kept for a recorded use                  kInUse, kResting, kStarted; kNone when not used
// kResting     kept until they are freed                kInUse, kRetained; kNone by reshard() alone
//
// kKept goes to kStarted, and kResting to kRetained, when the parameters are gathered again because
// the shard was written. Any other transition is an InternalError.
//
// Order duties, all by events:
//   a gather reads the shard after compute wrote it       (order_after_shard_writes)
//   hop 2 reads a block after hop 1 wrote it
//   hop 1 writes a block after hop 2 read what was in it
//   hop 2 writes a slot after compute read what was in it
//   compute reads the full parameters after hop 2 wrote them
//
// Host decisions (what starts, which slot) depend on the sequence of calls alone: ranks that make
// the same calls start the same collectives in the same order.
//
// Thread safety: one thread at a time. An exception leaves shards untouched; then reset().
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "mics/runtime_streams.h"
#include "mics/unit.h"
#include "runtime/runtime_memory.h"
#include "runtime/step_digest.h"

namespace mics {

enum class GatherState { kNone, kStarted, kRetained, kInUse, kRefreshing, kKept, kResting };

class GatherPipeline {
 public:
  // All outlive the pipeline. What it starts is noted in `digest`.
  GatherPipeline(const std::vector<std::shared_ptr<Unit>>& units, RuntimeStreams& streams,
                 StepDigest& digest);
  // Where gathers go; to be set before the first start. Only while nothing is gathered.
  void set_memory(RuntimeMemory* memory) { memory_ = memory; }

  // An outermost forward begins, or ends. `is_new`: no accumulation is open, so the forward uses
  // nothing that was gathered for an earlier one: shards may have been written since in ways that
  // no version counter shows (`p.data`, foreach kernels). Else it uses what was gathered since
  // the first forward of the accumulation. What was requested by hand stays. `records`: autograd
  // does.
  void begin_forward(bool is_new, bool records);
  void end_forward() { in_forward_ = false; }
  // The shard was written, or may have been: what was gathered from it is old. On all ranks alike.
  void note_written(int unit) { ++of(unit).num_writes; }
  // An accumulation ends: what follows is a write.
  void note_boundary() {
    ++num_boundaries_;
    accumulation_start_.reset();
  }
  // Makes gathers that start from here on wait for what compute was given until now, if a shard may
  // have been written since the last call: at each new forward, as many writes move no counter.
  void order_after_shard_writes();

  // False, and nothing is done: no memory is free and `may_grow` is not set.
  bool start_rail(int unit, bool may_grow);
  bool start_intra(int unit, bool may_grow);
  // The unit is in use from here on. Throws what a gather threw.
  void finish(int unit);
  // Ends the use of a unit, and keeps what `rest` says.
  void reshard(int unit, Residency rest);
  // Time that the calling thread waited in finish() for gathers of the unit.
  [[nodiscard]] std::chrono::nanoseconds exposed(int unit) const { return of(unit).exposed; }
  // Ends the use of a unit, and keeps everything for a recorded use.
  void keep(int unit);
  // Exempts a started unit from drop_unused() until its next finish() or reshard().
  void retain(int unit);
  // By hand: what the unit has, or gets next, serves the forwards to come, until it is freed.
  void request(int unit) { of(unit).is_requested = true; }
  void forget_request(int unit) { of(unit).is_requested = false; }
  // Frees what was started or kept for a recorded use that did not come.
  void drop_unused();
  // The unit's full parameters are current, in memory of its own, and not only started ahead.
  [[nodiscard]] bool is_kept_full(int unit) const;
  [[nodiscard]] GatherState state(int unit) const { return of(unit).state; }
  // Full parameters are on their way, and nobody has waited for them.
  [[nodiscard]] bool is_started(int unit) const {
    return state(unit) == GatherState::kStarted || state(unit) == GatherState::kRetained;
  }
  // A module holds the unit's full parameters.
  [[nodiscard]] bool is_in_use(int unit) const {
    return state(unit) == GatherState::kInUse || state(unit) == GatherState::kRefreshing;
  }
  [[nodiscard]] bool is_any_in_use() const;
  // Drops everything, and forgets the memory. The streams must be empty.
  void reset();

 private:
  // Hop 2 from one block to one full slot; they tell the slots apart by their addresses.
  struct Pairs {
    const void* full = nullptr;
    const void* block = nullptr;
    std::vector<TensorPair> pairs;
  };
  // Which values of a shard: those after `num_writes` reported writes, with `version` in
  // its version counters, since the last of `num_boundaries`, gathered in or after outermost
  // forward `forward`. A copy of other values is old. To a forward, so is one that was gathered
  // before the first forward whose copies it may use.
  // Version counters alone are not enough, as many writes move none; they may shorten the life of a
  // copy, never lengthen it. Ranks decide alike: the same calls are made on all, and torch counts
  // on all.
  struct Weights {
    int64_t num_writes = 0;
    int64_t version = 0;
    int64_t num_boundaries = 0;
    int64_t forward = 0;
    friend bool operator==(const Weights&, const Weights&) = default;
  };
  struct Gather {
    GatherState state = GatherState::kNone;
    Slot* full = nullptr;
    Slot* block = nullptr;
    std::optional<Weights> full_of;  // what was gathered; nullopt: nothing
    std::optional<Weights> block_of;
    std::optional<Weights> ordered;  // gathers wait for what compute wrote up to here
    int64_t num_writes = 0;
    bool is_requested = false;  // by hand
    std::chrono::nanoseconds exposed{0};
    std::unique_ptr<Event> block_written;
    std::unique_ptr<Event> full_written;
    std::vector<Pairs> pairs;  // of the planned slots met so far
  };

  [[nodiscard]] Unit& unit(int index) { return *units_[static_cast<size_t>(index)]; }
  [[nodiscard]] Gather& of(int index) { return gathers_[static_cast<size_t>(index)]; }
  [[nodiscard]] const Gather& of(int index) const { return gathers_[static_cast<size_t>(index)]; }
  void change_state(int index, GatherState next);
  // Full parameters are on their way: another state for each state in which they may be started.
  void note_started(int index);
  // Compute has waited for the gather.
  [[nodiscard]] bool is_awaited(int index) const;
  [[nodiscard]] Stream& block_stream(const Unit& unit);
  void make_events(int index);
  [[nodiscard]] Weights weights(int index) const;
  // A copy of `gathered` may be used for `index` now.
  [[nodiscard]] bool is_current(int index, const std::optional<Weights>& gathered) const;
  void order(int index);
  [[nodiscard]] bool take_full(int index, bool may_grow);
  [[nodiscard]] bool take_block(int index, bool may_grow);
  void free_full(int index);
  // The block is given back; `block->free` is marked, or only its own unit uses it.
  void give_back_block(int index);
  // The same when its hop 2 has not been issued.
  void free_block(int index);
  void send_intra(int index);
  // In place of hop 2, for a unit that is whole on this rank.
  void copy_shard(int index, const std::vector<TensorPair>& pairs);
  [[nodiscard]] std::vector<TensorPair> make_pairs(int index);

  const std::vector<std::shared_ptr<Unit>>& units_;
  RuntimeStreams& streams_;
  StepDigest& digest_;
  RuntimeMemory* memory_ = nullptr;
  const std::unique_ptr<Event> shards_written_;
  std::vector<Gather> gathers_;
  int64_t num_boundaries_ = 0;
  int64_t num_forwards_ = 0;                   // outermost ones that were new
  int64_t oldest_forward_ = 0;                 // whose copies the open forward may use
  std::optional<int64_t> accumulation_start_;  // the first forward that recorded since a boundary
  bool in_forward_ = false;
};

}  // namespace mics
