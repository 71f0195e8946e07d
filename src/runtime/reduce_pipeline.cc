#include "runtime/reduce_pipeline.h"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/scalar_tensor.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>

#include "plan/check.h"
#include "runtime/exposed_wait.h"

namespace mics {

namespace {

// sum = value, or sum += value.
void accumulate(Stream& stream, const at::Tensor& sum, const at::Tensor& value, bool is_first,
                const std::string& unit) {
  constexpr std::string_view kWhat = "sum of gradients";
  stream.note_read(value, kWhat, unit);
  if (!is_first) stream.note_read(sum, kWhat, unit);
  stream.note_write(sum, kWhat, unit);
  stream.enqueue([sum, value, is_first] {
    const c10::NoGradGuard no_grad;
    if (is_first) {
      sum.copy_(value);
    } else {
      sum.add_(value);
    }
  });
}

// Tensors over the same memory, which do not own it.
std::vector<at::Tensor> borrow(const std::vector<at::Tensor>& tensors) {
  std::vector<at::Tensor> borrowed;
  for (const at::Tensor& tensor : tensors) {
    borrowed.push_back(at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.options()));
  }
  return borrowed;
}

}  // namespace

ReducePipeline::ReducePipeline(const std::vector<std::shared_ptr<Unit>>& units,
                               const Depths& depths, RuntimeStreams& streams, StepDigest& digest)
    : units_(units),
      streams_(streams),
      digest_(digest),
      states_(units.size()),
      in_flight_(static_cast<size_t>(depths.reductions)) {
  make_events();
}

Stream& ReducePipeline::accumulation_stream(const Unit& unit) {
  if (unit.sums_in_place()) return *streams_.compute;
  return unit.communicators().reduce.num_nodes() > 1 ? *streams_.reduce_rail
                                                     : *streams_.reduce_intra;
}

// The alignment gaps are sent over the rails with the chunks, so they must hold numbers.
void ReducePipeline::zero_gaps(const Unit& unit, const at::Tensor& block) {
  const ShardLayout& layout = unit.gradients().layout();
  if (layout.payload_numel() == layout.shard_numel()) return;
  streams_.reduce_intra->note_write(block, "fill of alignment gaps", unit.name());
  streams_.reduce_intra->enqueue([block] {
    const c10::NoGradGuard no_grad;
    block.zero_();
  });
}

void ReducePipeline::reduce(int index) {
  Unit& reduced = unit(index);
  UnitGradients& gradients = reduced.gradients();
  if (gradients.layout().num_parameters() == 0) return;
  digest_.note(StepDigest::Launch::kReduce, index);
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  if (reduced.sums_in_place()) {
    gradients.sum_full();
    return streams_.compute->record(*state(index).accumulated);
  }
  const int slot = static_cast<int>(next_);
  InFlight& in_flight = in_flight_[next_];
  next_ = (next_ + 1) % in_flight_.size();
  // After these waits the memory of this slot's earlier reduction, and its gradients, are free.
  std::chrono::nanoseconds& exposed = state(index).exposed;
  wait_exposed(*streams_.compute, *in_flight.intra_done, "earlier reduction", reduced.name(),
               exposed);
  wait_exposed(*streams_.compute, *in_flight.rail_done, "earlier reduction", reduced.name(),
               exposed);
  in_flight.gradients.clear();
  std::vector<at::Tensor> regions = gradients.take_full([&](int64_t numel) {
    return memory_->packed_gradients(slot, numel, gradients.reduce_dtype());
  });
  constexpr std::string_view kWhat = "full gradients";
  for (const at::Tensor& region : regions) {
    streams_.compute->note_write(region, kWhat, reduced.name());
  }
  if (!gradients.accumulated().defined()) {
    streams_.compute->note_write(gradients.next_sum(), "fill of a sum", reduced.name());
  }
  if (streams_.frees_in_compute_order) {
    in_flight.gradients = regions;
    regions = borrow(regions);
  }
  streams_.compute->record(*gradients_ready_);
  streams_.reduce_intra->wait(*gradients_ready_);
  if (reduced.accumulates_block()) {
    reduce_to_block(index, slot, regions);
    streams_.reduce_intra->record(*state(index).block_summed);
  } else {
    reduce_to_shard(index, slot, regions);
    accumulation_stream(reduced).record(*state(index).accumulated);
    if (reduced.num_nodes() > 1) streams_.reduce_rail->record(*in_flight.rail_done);
  }
  streams_.reduce_intra->record(*in_flight.intra_done);
}

void ReducePipeline::reduce_to_block(int index, int slot, const std::vector<at::Tensor>& regions) {
  Unit& reduced = unit(index);
  UnitGradients& gradients = reduced.gradients();
  const HopCommunicators& hops = reduced.communicators().reduce;
  Stream& stream = *streams_.reduce_intra;
  const at::Tensor sum = gradient_block(index, stream);
  const bool is_first = !gradients.has_block();
  const bool is_direct = is_first && sum.scalar_type() == gradients.reduce_dtype();
  // A late gradient: hop 2 of the block has run in this backward, and may still read the block.
  if (is_first && gradients.state() == GradientState::kSynchronized) {
    stream.wait(*state(index).accumulated);
  }
  const at::Tensor block =
      is_direct ? sum : memory_->reduce_block(slot, sum.numel(), gradients.reduce_dtype(), stream);
  zero_gaps(reduced, block);
  const std::vector<TensorPair> pairs = reduce_pairs(gradients.layout(), regions, block, hops);
  if (!pairs.empty()) hops.intra->reduce_scatter(pairs, stream, reduced.name());
  if (!is_direct) accumulate(stream, sum, block, is_first, reduced.name());
  gradients.set_has_block(true);
}

void ReducePipeline::reduce_to_shard(int index, int slot, const std::vector<at::Tensor>& regions) {
  Unit& reduced = unit(index);
  UnitGradients& gradients = reduced.gradients();
  const ShardLayout& layout = gradients.layout();
  const at::ScalarType dtype = gradients.reduce_dtype();
  const HopCommunicators& hops = reduced.communicators().reduce;
  const bool is_first = !gradients.accumulated().defined();
  const at::Tensor sum = is_first ? gradients.new_accumulated() : gradients.accumulated();
  const bool is_direct = is_first && sum.scalar_type() == dtype;
  at::Tensor own = sum;
  if (hops.rail == nullptr) {
    if (!is_direct) {
      own = memory_->reduce_block(slot, layout.shard_numel(), dtype, *streams_.reduce_intra);
      zero_gaps(reduced, own);
    }
    const std::vector<TensorPair> pairs = reduce_pairs(layout, regions, own, hops);
    if (!pairs.empty()) hops.intra->reduce_scatter(pairs, *streams_.reduce_intra, reduced.name());
  } else {
    const at::Tensor block = memory_->reduce_block(slot, hops.num_nodes() * layout.shard_numel(),
                                                   dtype, *streams_.reduce_intra);
    zero_gaps(reduced, block);
    const std::vector<TensorPair> pairs = reduce_pairs(layout, regions, block, hops);
    if (!pairs.empty()) hops.intra->reduce_scatter(pairs, *streams_.reduce_intra, reduced.name());
    streams_.reduce_intra->record(*state(index).block_summed);
    streams_.reduce_rail->wait(*state(index).block_summed);
    if (!is_direct) own = own_slot(layout, block, hops);
    hops.rail->reduce_scatter(own, block, *streams_.reduce_rail, reduced.name());
  }
  if (!is_direct) accumulate(accumulation_stream(reduced), sum, own, is_first, reduced.name());
}

at::Tensor ReducePipeline::gradient_block(int index, Stream& first) {
  const Unit& owner = unit(index);
  const UnitGradients& gradients = owner.gradients();
  const int64_t numel = owner.communicators().reduce.num_nodes() * gradients.layout().shard_numel();
  return memory_->gradient_block(index, numel, accumulation_dtype(gradients.reduce_dtype()), first);
}

// Runs hop 2 for what was accumulated in a gradient block.
void ReducePipeline::reduce_accumulated_block(int index) {
  UnitGradients& gradients = unit(index).gradients();
  const HopCommunicators& hops = unit(index).communicators().reduce;
  Stream& stream = *streams_.reduce_rail;
  stream.wait(*state(index).block_summed);
  const at::Tensor block = gradient_block(index, stream);
  const bool is_first = !gradients.accumulated().defined();
  const at::Tensor sum = is_first ? gradients.new_accumulated() : gradients.accumulated();
  const at::Tensor own = is_first ? sum : own_slot(gradients.layout(), block, hops);
  hops.rail->reduce_scatter(own, block, stream, unit(index).name());
  if (!is_first) accumulate(stream, sum, own, /*is_first=*/false, unit(index).name());
  stream.record(*state(index).accumulated);
  gradients.set_has_block(false);
}

void ReducePipeline::settle(int index) {
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  const UnitGradients& gradients = unit(index).gradients();
  if (gradients.has_block()) reduce_accumulated_block(index);
  if (gradients.synchronized().defined()) wait(index);
  if (gradients.accumulated().defined()) {
    wait_exposed(*streams_.compute, *state(index).accumulated, "reduction", unit(index).name(),
                 state(index).exposed);
  }
}

void ReducePipeline::synchronize(int index) {
  Unit& synchronized = unit(index);
  UnitGradients& gradients = synchronized.gradients();
  if (!has_accumulated(gradients.state())) return;
  digest_.note(StepDigest::Launch::kSynchronize, index);
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  if (gradients.has_block()) reduce_accumulated_block(index);
  Stream& stream = *streams_.replicate;
  stream.wait(*state(index).accumulated);
  const at::Tensor sum = gradients.accumulated();
  if (Communicator* replicate = synchronized.communicators().replicate; replicate != nullptr) {
    replicate->all_reduce(sum, stream, synchronized.name());
  }
  if (const double factor = synchronized.settings().gradient_factor; factor != 1.0) {
    stream.note_read(sum, "factor of gradients", synchronized.name());
    stream.note_write(sum, "factor of gradients", synchronized.name());
    stream.enqueue([sum, scalar = factor_of(factor, sum)] {
      const c10::NoGradGuard no_grad_here;
      sum.mul_(scalar);
    });
  }
  if (gradients.synchronized().defined()) {
    accumulate(stream, gradients.synchronized(), sum, /*is_first=*/false, synchronized.name());
    state(index).added.push_back(sum);
  }
  gradients.note_synchronized();
  stream.record(*state(index).synchronized);
}

// mul_() would make a tensor of a plain number each time. One tensor is kept for each dtype.
const at::Tensor& ReducePipeline::factor_of(double factor, const at::Tensor& like) {
  for (const Factor& known : factors_) {
    if (known.value == factor && known.tensor.scalar_type() == like.scalar_type()) {
      return known.tensor;
    }
  }
  factors_.push_back({factor, at::scalar_tensor(factor, like.scalar_type())});
  return factors_.back().tensor;
}

void ReducePipeline::set_num_in_flight(int reductions) {
  in_flight_.clear();
  in_flight_.resize(static_cast<size_t>(reductions));
  next_ = 0;
  make_events();
}

void ReducePipeline::free_gradients() {
  for (InFlight& in_flight : in_flight_) {
    if (in_flight.gradients.empty()) continue;
    streams_.compute->wait(*in_flight.intra_done);
    in_flight.gradients.clear();
  }
}

void ReducePipeline::wait(int index) {
  wait_exposed(*streams_.compute, *state(index).synchronized, "reduction", unit(index).name(),
               state(index).exposed);
  state(index).added.clear();
}

bool ReducePipeline::holds_block() const {
  return std::any_of(units_.begin(), units_.end(),
                     [](const auto& unit) { return unit->gradients().has_block(); });
}

void ReducePipeline::drop(int index) {
  // Memory that is still being written must not be reused.
  UnitGradients& gradients = unit(index).gradients();
  if (gradients.synchronized().defined()) wait(index);
  if (gradients.accumulated().defined()) {
    wait_exposed(*streams_.compute, *state(index).accumulated, "reduction", unit(index).name(),
                 state(index).exposed);
  }
  gradients.drop();
}

void ReducePipeline::reset() {
  for (const std::shared_ptr<Unit>& dropped : units_) dropped->gradients().drop();
  for (InFlight& slot : in_flight_) slot.gradients.clear();
  make_events();
  memory_ = nullptr;
}

// Makes new events: old ones keep a failure, and must not be waited for after it.
void ReducePipeline::make_events() {
  gradients_ready_ = streams_.compute->make_event();
  for (size_t i = 0; i < units_.size(); ++i) {
    states_[i].block_summed = streams_.reduce_intra->make_event();
    states_[i].accumulated = accumulation_stream(*units_[i]).make_event();
    states_[i].synchronized = streams_.replicate->make_event();
    states_[i].added.clear();
  }
  for (InFlight& slot : in_flight_) {
    slot.intra_done = streams_.reduce_intra->make_event();
    slot.rail_done = streams_.reduce_rail->make_event();
  }
}

}  // namespace mics
