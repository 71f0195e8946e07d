#include "runtime/runtime_memory.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "plan/check.h"
#include "runtime/sum_memory.h"

namespace mics {

namespace {

// Alignment of every region, as vector instructions and network cards like it best.
constexpr int64_t kRegionAlignment = 512;

at::Tensor allocate(int64_t nbytes, at::Device device) {
  // Buffers made here outlive the caller's inference mode.
  const c10::InferenceMode no_inference(false);
  return at::empty({nbytes}, at::TensorOptions().dtype(at::kByte).device(device));
}

std::vector<int64_t> largest(std::vector<int64_t> sizes, int count) {
  std::sort(sizes.begin(), sizes.end(), std::greater<>());
  if (sizes.size() > static_cast<size_t>(count)) sizes.resize(static_cast<size_t>(count));
  return sizes;
}

int64_t nbytes_of(int64_t numel, at::ScalarType dtype) {
  return numel * static_cast<int64_t>(c10::elementSize(dtype));
}

}  // namespace

// Cuts regions from an allocation whose size is known only when all have been asked for.
class RuntimeMemory::Cutter {
 public:
  void ask(std::string part, int64_t nbytes, std::function<void(at::Tensor)> give) {
    if (nbytes == 0) return;
    const auto found = std::find_if(parts_.begin(), parts_.end(),
                                    [&](const MemoryPart& other) { return other.name == part; });
    MemoryPart& entry =
        found != parts_.end() ? *found : parts_.emplace_back(MemoryPart{std::move(part), 0, 0});
    const int64_t aligned = (nbytes + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
    entry.count += 1;
    entry.nbytes += aligned;
    wishes_.push_back({total_, nbytes, std::move(give)});
    total_ += aligned;
  }

  void cut(const at::Tensor& memory) {
    for (const Wish& wish : wishes_) wish.give(memory.narrow(0, wish.offset, wish.nbytes));
  }

  [[nodiscard]] int64_t total() const { return total_; }
  [[nodiscard]] const std::vector<MemoryPart>& parts() const { return parts_; }

 private:
  struct Wish {
    int64_t offset;
    int64_t nbytes;
    std::function<void(at::Tensor)> give;
  };
  std::vector<MemoryPart> parts_;
  std::vector<Wish> wishes_;
  int64_t total_ = 0;
};

at::Tensor Slot::as(at::ScalarType dtype, int64_t numel) const {
  return memory.narrow(0, 0, nbytes_of(numel, dtype)).view(dtype);
}

void SlotPool::add(at::Tensor memory) {
  slots_.push_back({std::move(memory), compute_.make_event()});
}

Slot* SlotPool::take(int64_t nbytes) {
  Slot* best = nullptr;
  const auto rank = [](const Slot& slot) {
    return std::pair(slot.memory.numel(), slot.given_back);
  };
  for (Slot& slot : slots_) {
    if (slot.is_taken || slot.memory.numel() < nbytes) continue;
    if (best == nullptr || rank(slot) < rank(*best)) best = &slot;
  }
  if (best != nullptr) best->is_taken = true;
  return best;
}

Slot* SlotPool::grow(int64_t nbytes, at::Device device) {
  add(allocate(nbytes, device));
  slots_.back().is_taken = true;
  slots_.back().is_planned = false;
  compute_.note_write(slots_.back().memory, "allocation of a slot");
  compute_.record(*slots_.back().free);
  free_passed();
  return &slots_.back();
}

void SlotPool::give_back(Slot* slot) {
  MICS_INTERNAL_CHECK(slot->is_taken, "a slot was given back twice.");
  slot->is_taken = false;
  slot->given_back = ++num_given_back_;
  if (slot->is_planned) return;
  const auto place = std::find_if(slots_.begin(), slots_.end(),
                                  [slot](const Slot& other) { return &other == slot; });
  retired_.splice(retired_.end(), slots_, place);
  free_passed();
}

void SlotPool::free_passed() {
  retired_.remove_if([this](const Slot& slot) { return compute_.has_passed(*slot.free); });
}

RuntimeMemory::RuntimeMemory(const std::vector<std::shared_ptr<Unit>>& units, const Depths& depths,
                             Stream& compute, int64_t num_flags)
    : compute_(compute),
      allocated_(compute.make_event()),
      device_(units.front()->parameters().shard().device()),
      key_(key_of(units)),
      full_slots_(compute),
      block_slots_(compute),
      homes_(units.size()),
      reductions_(static_cast<size_t>(depths.reductions)) {
  // Views made in the caller's inference mode could not be written to later.
  const c10::InferenceMode no_inference(false);
  Cutter cutter;
  plan_units(units, depths, cutter);
  plan_reductions(units, cutter);
  cutter.ask("flags", num_flags * static_cast<int64_t>(sizeof(int64_t)),
             [this](const at::Tensor& memory) { flags_ = memory.view(at::kLong); });
  for (Communicator* carrier : hop_communicators(units)) {
    if (cutter.total() > 0) whole_ = carrier->allocate(cutter.total());
    is_of_backend_ = whole_.defined();
    if (is_of_backend_) break;
  }
  if (!is_of_backend_) whole_ = allocate(cutter.total(), device_);
  cutter.cut(whole_);
  parts_ = cutter.parts();
  nbytes_ = cutter.total();
  MemoryPart sums = {"gradient sums", 0, 0};
  for (const std::shared_ptr<Unit>& unit : units) {
    const int64_t nbytes = unit->gradients().sum_memory().plan();
    sums.count += nbytes > 0 ? 1 : 0;
    sums.nbytes += nbytes;
  }
  if (sums.count > 0) parts_.push_back(std::move(sums));
}

void RuntimeMemory::plan_units(const std::vector<std::shared_ptr<Unit>>& units,
                               const Depths& depths, Cutter& cutter) {
  std::vector<int64_t> full_sizes;
  std::vector<int64_t> block_sizes;
  const auto home_slot = [this](std::unique_ptr<Slot>& home) {
    return [this, &home](at::Tensor memory) {
      home = std::make_unique<Slot>(Slot{std::move(memory), compute_.make_event()});
    };
  };
  for (size_t i = 0; i < units.size(); ++i) {
    const Unit& unit = *units[i];
    const int64_t full_nbytes = unit.parameters().full_nbytes();
    if (unit.keeps_full()) {
      cutter.ask("full, kept", full_nbytes, home_slot(homes_[i].full));
    } else {
      full_sizes.push_back(full_nbytes);
    }
    if (unit.keeps_block()) {
      cutter.ask("blocks, kept", unit.block_nbytes(), home_slot(homes_[i].block));
    } else {
      block_sizes.push_back(unit.block_nbytes());
    }
    const UnitGradients& gradients = unit.gradients();
    if (unit.accumulates_block() && gradients.layout().num_parameters() > 0) {
      const int64_t numel = unit.num_nodes() * gradients.layout().shard_numel();
      cutter.ask(
          "gradient blocks", nbytes_of(numel, accumulation_dtype(gradients.reduce_dtype())),
          [&home = homes_[i]](at::Tensor memory) { home.gradient_block = std::move(memory); });
    }
  }
  for (const int64_t nbytes : largest(std::move(full_sizes), depths.intra + 1)) {
    cutter.ask("full slots", nbytes,
               [this](at::Tensor memory) { full_slots_.add(std::move(memory)); });
  }
  // Hop 2 gives its block back when it is issued: one block fills while another is read. They take
  // turns, so each must fit every unit.
  const std::vector<int64_t> blocks =
      largest(std::move(block_sizes), depths.rail - depths.intra + 1);
  for (size_t i = 0; i < blocks.size(); ++i) {
    cutter.ask("block slots", blocks.front(),
               [this](at::Tensor memory) { block_slots_.add(std::move(memory)); });
  }
}

void RuntimeMemory::plan_reductions(const std::vector<std::shared_ptr<Unit>>& units,
                                    Cutter& cutter) {
  int64_t block_nbytes = 0;
  int64_t packed_nbytes = 0;
  for (const std::shared_ptr<Unit>& unit : units) {
    const UnitGradients& gradients = unit->gradients();
    if (gradients.layout().num_parameters() == 0 || unit->sums_in_place()) continue;
    const at::ScalarType dtype = gradients.reduce_dtype();
    const int64_t numel = unit->num_nodes() * gradients.layout().shard_numel();
    block_nbytes = std::max(block_nbytes, nbytes_of(numel, dtype));
    packed_nbytes = std::max(packed_nbytes, nbytes_of(unit->packed_numel(), dtype));
  }
  for (Reduction& reduction : reductions_) {
    cutter.ask("reductions", block_nbytes,
               [&reduction](at::Tensor memory) { reduction.block = std::move(memory); });
    cutter.ask("packed gradients", packed_nbytes,
               [&reduction](at::Tensor memory) { reduction.packed = std::move(memory); });
  }
}

RuntimeMemory::Key RuntimeMemory::key_of(const std::vector<std::shared_ptr<Unit>>& units) {
  Key key;
  for (const std::shared_ptr<Unit>& unit : units) {
    key.push_back({unit->keeps_full(), unit->keeps_block(), unit->accumulates_block(),
                   unit->gradients().layout().shard_numel()});
  }
  return key;
}

bool RuntimeMemory::is_planned_for(const std::vector<std::shared_ptr<Unit>>& units) const {
  return key_ == key_of(units);
}

void RuntimeMemory::register_with(const std::vector<std::shared_ptr<Unit>>& units) {
  is_registered_ = true;
  for (Communicator* carrier : hop_communicators(units)) {
    if (auto registration = carrier->register_memory(whole_)) {
      registrations_.push_back(std::move(registration));
    }
  }
}

at::Tensor RuntimeMemory::fit(at::Tensor& memory, int64_t numel, at::ScalarType dtype,
                              Stream& first) {
  const int64_t nbytes = nbytes_of(numel, dtype);
  if (!memory.defined() || memory.numel() < nbytes) {
    ++num_grown_;
    grown_nbytes_ += nbytes;
    memory = allocate(nbytes, device_);
    compute_.note_write(memory, "allocation");
    if (&first != &compute_) {
      compute_.record(*allocated_);
      first.wait(*allocated_);
    }
  }
  return memory.narrow(0, 0, nbytes).view(dtype);
}

Slot* RuntimeMemory::grow_full(int64_t nbytes) {
  ++num_grown_;
  grown_nbytes_ += nbytes;
  return full_slots_.grow(nbytes, device_);
}

Slot* RuntimeMemory::grow_block(int64_t nbytes) {
  ++num_grown_;
  grown_nbytes_ += nbytes;
  return block_slots_.grow(nbytes, device_);
}

}  // namespace mics
