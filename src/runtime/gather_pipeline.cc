#include "runtime/gather_pipeline.h"

#include <ATen/ops/_foreach_copy.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "plan/check.h"
#include "runtime/exposed_wait.h"

namespace mics {

GatherPipeline::GatherPipeline(const std::vector<std::shared_ptr<Unit>>& units,
                               RuntimeStreams& streams, StepDigest& digest)
    : units_(units),
      streams_(streams),
      digest_(digest),
      shards_written_(streams.compute->make_event()),
      gathers_(units.size()) {
  for (size_t i = 0; i < units.size(); ++i) make_events(static_cast<int>(i));
}

namespace {

// As bytes where a backend may not know the dtype (fp8, integers): a gather does not compute.
at::Tensor to_move(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16:
      return tensor;
    default:
      return tensor.view({-1}).view(at::kByte);
  }
}

// Row: state; column: the next one. In the order of GatherState; see the header.
constexpr bool kIsLegal[7][7] = {
    // kNone kStarted kRetained kInUse kRefreshing kKept kResting
    {true, true, false, false, false, false, false},  // kNone
    {true, true, true, true, false, false, false},    // kStarted
    {true, false, true, true, false, false, false},   // kRetained
    {true, false, false, true, true, true, true},     // kInUse
    {true, true, true, true, true, false, false},     // kRefreshing
    {true, true, false, true, false, true, true},     // kKept
    {true, false, true, true, false, false, true},    // kResting
};

}  // namespace

void GatherPipeline::change_state(int index, GatherState next) {
  MICS_INTERNAL_CHECK(kIsLegal[static_cast<size_t>(state(index))][static_cast<size_t>(next)],
                      "a gather of unit \"", unit(index).name(), "\" goes from state ",
                      static_cast<int>(of(index).state), " to ", static_cast<int>(next), ".");
  of(index).state = next;
}

void GatherPipeline::note_started(int index) {
  using enum GatherState;
  switch (of(index).state) {
    case kNone:
    case kStarted:
    case kKept:
      return change_state(index, kStarted);
    case kRetained:
    case kResting:
      return change_state(index, kRetained);
    case kInUse:
    case kRefreshing:
      return change_state(index, kRefreshing);
  }
}

bool GatherPipeline::is_awaited(int index) const {
  using enum GatherState;
  const GatherState now = state(index);
  return now == kInUse || now == kKept || now == kResting;
}

// The stream of hop 1, or of the cast of the shard where there is one node.
Stream& GatherPipeline::block_stream(const Unit& unit) {
  return unit.num_nodes() > 1 ? *streams_.gather_rail : *streams_.gather_intra;
}

GatherPipeline::Weights GatherPipeline::weights(int index) const {
  const Unit& of_unit = *units_[static_cast<size_t>(index)];
  return {of(index).num_writes, of_unit.parameters().shard_version(), num_boundaries_,
          num_forwards_};
}

bool GatherPipeline::is_current(int index, const std::optional<Weights>& gathered) const {
  if (!gathered.has_value()) return false;
  Weights now = weights(index);
  now.forward = gathered->forward;
  if (*gathered != now) return false;
  // In a backward, what its forward used is current.
  return !in_forward_ || of(index).is_requested || gathered->forward >= oldest_forward_;
}

void GatherPipeline::begin_forward(bool is_new, bool records) {
  in_forward_ = true;
  if (is_new) {
    if (oldest_forward_ < num_forwards_) accumulation_start_.reset();  // was given up
    oldest_forward_ = ++num_forwards_;
    if (records && !accumulation_start_.has_value()) accumulation_start_ = num_forwards_;
  } else {
    oldest_forward_ = accumulation_start_.value_or(num_forwards_);
  }
}

void GatherPipeline::order_after_shard_writes() {
  bool may_be_written = false;
  for (size_t i = 0; i < units_.size(); ++i) {
    const Weights now = weights(static_cast<int>(i));
    std::optional<Weights>& ordered = gathers_[i].ordered;
    if (ordered == now) continue;
    ordered = now;
    may_be_written = true;
  }
  if (!may_be_written) return;
  streams_.compute->record(*shards_written_);
  streams_.gather_rail->wait(*shards_written_);
  streams_.gather_intra->wait(*shards_written_);
}

// For writes in the middle of a step.
void GatherPipeline::order(int index) {
  if (of(index).ordered != weights(index)) order_after_shard_writes();
}

bool GatherPipeline::take_block(int index, bool may_grow) {
  Gather& taken = of(index);
  if (taken.block != nullptr) return true;
  const int64_t nbytes = unit(index).block_nbytes();
  taken.block = memory_->block_home(index);
  if (taken.block == nullptr) taken.block = memory_->block_slots().take(nbytes);
  if (taken.block == nullptr && may_grow) taken.block = memory_->grow_block(nbytes);
  return taken.block != nullptr;
}

bool GatherPipeline::take_full(int index, bool may_grow) {
  Gather& taken = of(index);
  if (taken.full != nullptr) return true;
  const int64_t nbytes = unit(index).parameters().full_nbytes();
  taken.full = memory_->full_home(index);
  if (taken.full == nullptr) taken.full = memory_->full_slots().take(nbytes);
  if (taken.full == nullptr && may_grow) taken.full = memory_->grow_full(nbytes);
  return taken.full != nullptr;
}

// The slots are written by the stream of hop 1, of units with one node by that of hop 2: so the next
// owner waits for the latter.
void GatherPipeline::free_block(int index) {
  const Gather& taken = of(index);
  if (taken.block != nullptr && taken.block != memory_->block_home(index)) {
    streams_.gather_intra->wait(*taken.block_written);
    streams_.gather_intra->record(*taken.block->free);
  }
  give_back_block(index);
}

void GatherPipeline::give_back_block(int index) {
  Gather& taken = of(index);
  taken.block_of.reset();
  if (taken.block == nullptr) return;
  if (taken.block != memory_->block_home(index)) memory_->block_slots().give_back(taken.block);
  taken.block = nullptr;
}

// The slot is free when compute, its last reader, has come this far. Where nobody has waited for the
// gather, only gathers have used the slot, and they have one stream.
void GatherPipeline::free_full(int index) {
  Gather& taken = of(index);
  const bool was_read = is_awaited(index);
  unit(index).parameters().detach();
  change_state(index, GatherState::kNone);
  taken.full_of.reset();
  taken.is_requested = false;
  if (taken.full == nullptr) return;
  if (was_read) {
    streams_.compute->note_read(taken.full->memory, "use of full parameters", unit(index).name());
  }
  // A grown slot goes back to the allocator.
  if (!was_read && !taken.full->is_planned) streams_.compute->wait(*taken.full_written);
  streams_.compute->record(*taken.full->free);
  if (taken.full != memory_->full_home(index)) memory_->full_slots().give_back(taken.full);
  taken.full = nullptr;
}

bool GatherPipeline::start_rail(int index, bool may_grow) {
  Unit& started = unit(index);
  Gather& to = of(index);
  if (!started.has_block() || is_current(index, to.block_of) || is_current(index, to.full_of)) {
    return true;
  }
  if (!take_block(index, may_grow)) return false;
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  order(index);
  Stream& stream = block_stream(started);
  stream.wait(*to.block->free);
  const HopCommunicators& hops = started.communicators().gather;
  const UnitParameters& parameters = started.parameters();
  const ShardLayout& layout = parameters.layout();
  const at::Tensor block =
      to.block->as(parameters.dtype(), hops.num_nodes() * layout.shard_numel());
  at::Tensor own = parameters.shard();
  if (own.scalar_type() != parameters.dtype()) {
    own = own_slot(layout, block, hops);
    stream.note_read(parameters.shard(), "cast of the shard", started.name());
    stream.note_write(own, "cast of the shard", started.name());
    stream.enqueue([own, shard = parameters.shard()] {
      const c10::NoGradGuard no_grad_here;
      own.copy_(shard);
    });
  }
  if (hops.rail != nullptr) {
    digest_.note(StepDigest::Launch::kGatherRail, index);
    hops.rail->all_gather(to_move(block), to_move(own), stream, started.name());
  }
  stream.record(*to.block_written);
  to.block_of = weights(index);
  return true;
}

std::vector<TensorPair> GatherPipeline::make_pairs(int index) {
  const Gather& to = of(index);
  const UnitParameters& parameters = unit(index).parameters();
  const ShardLayout& layout = parameters.layout();
  const HopCommunicators& hops = unit(index).communicators().gather;
  const at::Tensor block =
      to.block == nullptr
          ? parameters.shard()
          : to.block->as(parameters.dtype(), hops.num_nodes() * layout.shard_numel());
  std::vector<TensorPair> pairs =
      gather_pairs(layout, block, to.full->as(parameters.dtype(), layout.full_numel()), hops);
  if (unit(index).is_whole()) return pairs;  // copies cast
  for (TensorPair& pair : pairs) pair = {to_move(pair.output), to_move(pair.input)};
  return pairs;
}

// One launch casts all parameters, so a byte is read once and written once.
void GatherPipeline::copy_shard(int index, const std::vector<TensorPair>& pairs) {
  std::vector<at::Tensor> outputs;
  std::vector<at::Tensor> inputs;
  for (const TensorPair& pair : pairs) {
    streams_.gather_intra->note_read(pair.input, "cast of the shard", unit(index).name());
    streams_.gather_intra->note_write(pair.output, "cast of the shard", unit(index).name());
    outputs.push_back(pair.output);
    inputs.push_back(pair.input);
  }
  streams_.gather_intra->enqueue([outputs = std::move(outputs), inputs = std::move(inputs)] {
    const c10::NoGradGuard no_grad;
    at::_foreach_copy_(outputs, inputs);
  });
}

// Hop 2. Its tensors are made once per pair of planned slots, and kept. Those of a grown slot are
// not kept: the slot is freed with its last tensor.
void GatherPipeline::send_intra(int index) {
  Gather& to = of(index);
  Unit& started = unit(index);
  Communicator& intra = *started.communicators().gather.intra;
  const auto send = [&](const std::vector<TensorPair>& pairs) {
    if (intra.group().size() > 1) digest_.note(StepDigest::Launch::kGatherIntra, index);
    if (pairs.empty()) return;
    if (started.is_whole()) return copy_shard(index, pairs);
    intra.all_gather(pairs, *streams_.gather_intra, started.name());
  };
  if (!to.full->is_planned || (to.block != nullptr && !to.block->is_planned)) {
    return send(make_pairs(index));
  }
  const void* full = to.full->memory.const_data_ptr();
  const void* block = to.block != nullptr ? to.block->memory.const_data_ptr()
                                          : started.parameters().shard().const_data_ptr();
  auto kept = std::find_if(to.pairs.begin(), to.pairs.end(), [&](const Pairs& known) {
    return known.full == full && known.block == block;
  });
  if (kept == to.pairs.end()) {
    kept = to.pairs.insert(to.pairs.end(), {full, block, make_pairs(index)});
  }
  send(kept->pairs);
}

bool GatherPipeline::start_intra(int index, bool may_grow) {
  Unit& started = unit(index);
  Gather& to = of(index);
  if (is_current(index, to.full_of)) return true;
  if (started.parameters().full_is_shard()) {
    to.full_of = weights(index);
    note_started(index);
    return true;
  }
  const bool had_full = to.full != nullptr;
  if (!take_full(index, may_grow)) return false;
  if (!start_rail(index, may_grow)) {
    if (!had_full) free_full(index);
    return false;
  }
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  order(index);
  Stream& stream = *streams_.gather_intra;
  to.full_of.reset();
  note_started(index);
  if (started.num_nodes() > 1) stream.wait(*to.block_written);
  stream.wait(*to.full->free);
  send_intra(index);
  stream.record(*to.full_written);
  if (to.block != nullptr) stream.record(*to.block->free);
  if (!started.keeps_block()) give_back_block(index);
  to.full_of = weights(index);
  return true;
}

void GatherPipeline::finish(int index) {
  UnitParameters& parameters = unit(index).parameters();
  Gather& to = of(index);
  MICS_INTERNAL_CHECK(start_intra(index, /*may_grow=*/true), "no memory for a gather.");
  if (!parameters.full_is_shard()) {
    if (!is_awaited(index)) {
      wait_exposed(*streams_.compute, *to.full_written, "gather", unit(index).name(), to.exposed);
    }
    streams_.compute->note_read(to.full->memory, "use of full parameters", unit(index).name());
  }
  if (!parameters.is_unsharded()) {
    parameters.attach(to.full != nullptr ? to.full->memory : parameters.shard());
  }
  parameters.note_gathered(to.full_of->version + to.full_of->num_writes);
  change_state(index, GatherState::kInUse);
  parameters.register_parameters(ParameterKind::kFull);
}

void GatherPipeline::reshard(int index, Residency rest) {
  keep(index);
  if (rest == Residency::kFull) return retain(index);
  free_full(index);
  if (rest == Residency::kShard) free_block(index);
}

void GatherPipeline::keep(int index) {
  unit(index).parameters().register_parameters(ParameterKind::kSharded);
  if (state(index) == GatherState::kInUse) change_state(index, GatherState::kKept);
  if (state(index) == GatherState::kRefreshing) change_state(index, GatherState::kStarted);
}

void GatherPipeline::retain(int index) {
  if (state(index) == GatherState::kStarted) change_state(index, GatherState::kRetained);
  if (state(index) == GatherState::kKept) change_state(index, GatherState::kResting);
}

void GatherPipeline::drop_unused() {
  for (int index = 0; index < static_cast<int>(gathers_.size()); ++index) {
    const GatherState now = state(index);
    const bool is_expected = now == GatherState::kStarted || now == GatherState::kKept;
    if (is_expected) free_full(index);
    if ((is_expected || now == GatherState::kNone) && !unit(index).keeps_block()) {
      free_block(index);
    }
  }
}

bool GatherPipeline::is_kept_full(int index) const {
  const Gather& kept = of(index);
  return is_awaited(index) && kept.full != nullptr && kept.full == memory_->full_home(index) &&
         is_current(index, kept.full_of);
}

bool GatherPipeline::is_any_in_use() const {
  for (int index = 0; index < static_cast<int>(gathers_.size()); ++index) {
    if (is_in_use(index)) return true;
  }
  return false;
}

void GatherPipeline::reset() {
  for (int index = 0; index < static_cast<int>(gathers_.size()); ++index) {
    unit(index).parameters().register_parameters(ParameterKind::kSharded);
    unit(index).parameters().detach();
    // Events keep a failure, so new ones are made. Graphs that are alive still compare num_writes.
    const int64_t num_writes = of(index).num_writes;
    of(index) = Gather();
    of(index).num_writes = num_writes;
    make_events(index);
  }
  memory_ = nullptr;
}

void GatherPipeline::make_events(int index) {
  of(index).block_written = block_stream(unit(index)).make_event();
  of(index).full_written = streams_.gather_intra->make_event();
}

}  // namespace mics
