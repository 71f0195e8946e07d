// ReducePipeline: turns full gradients into synchronised gradient shards, beside the backward.
//
//   reduce(u)       full --hop 1, reduce_intra--> block --hop 2, reduce_rail--> accumulated
//   synchronize(u)  accumulated --all-reduce, replicate--> times factor --> synchronized
//   wait(u)         compute waits for synchronized
//
// A unit that accumulates blocks adds hop 1's result to its gradient block in every micro-step, and
// hop 2 runs in synchronize(): once per step. Sums are then taken in another order (micro-steps
// before nodes).
//
// Order duties, all by events:
//   hop 1 reads gradients after compute wrote them
//   hop 2 reads a block after hop 1 wrote it; a later reduction writes it after hop 2 read it
//   the all-reduce reads accumulated after it was added to
//   compute reads synchronized after the all-reduce
// At most `depths.reductions` are in flight: the next one waits, so that full gradients do not pile
// up.
//
// Thread safety: one thread at a time. Errors of queued work come out of later waits; then reset().
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "mics/runtime_streams.h"
#include "mics/unit.h"
#include "runtime/runtime_memory.h"
#include "runtime/step_digest.h"

namespace mics {

class ReducePipeline {
 public:
  // All outlive the pipeline. What it starts is noted in `digest`.
  ReducePipeline(const std::vector<std::shared_ptr<Unit>>& units, const Depths& depths,
                 RuntimeStreams& streams, StepDigest& digest);
  void set_memory(RuntimeMemory* memory) { memory_ = memory; }

  // Nothing may be in flight.
  void set_num_in_flight(int reductions);

  // Takes the unit's full gradients. Those that are missing on this rank count as zeros.
  void reduce(int unit);
  // Nothing when nothing is accumulated.
  void synchronize(int unit);
  // The end of a backward: releases the gradients that reductions still read, after an edge that
  // makes compute wait for them. Nothing where the host frees them when they have been read.
  void free_gradients();
  // Until then synchronized() must not be read. Throws what the reduction threw.
  void wait(int unit);
  // Time that the calling thread waited in reduce() and wait() for the unit.
  [[nodiscard]] std::chrono::nanoseconds exposed(int unit) const {
    return states_[static_cast<size_t>(unit)].exposed;
  }
  // Brings what the unit has accumulated into accumulated(), and lets compute wait for it.
  void settle(int unit);
  // A gradient block holds a sum of earlier micro-steps.
  [[nodiscard]] bool holds_block() const;
  // Drops the unit's gradients that have not become visible.
  void drop(int unit);
  // Drops them, and forgets the memory. The streams must be empty.
  void reset();

 private:
  struct State {
    std::chrono::nanoseconds exposed{0};
    std::unique_ptr<Event> block_summed;  // hop 1 is done; with a gradient block: added to it
    std::unique_ptr<Event> accumulated;   // accumulated is whole
    std::unique_ptr<Event> synchronized;  // synchronized is whole
    // Sums that were added to synchronized, until compute has waited for that.
    std::vector<at::Tensor> added;
  };
  struct Factor {
    double value = 1;
    at::Tensor tensor;  // [], on the CPU
  };
  struct InFlight {
    std::unique_ptr<Event> intra_done;
    std::unique_ptr<Event> rail_done;
    // Gradients that it reads, where memory is freed in the order of compute.
    std::vector<at::Tensor> gradients;
  };
  void make_events();
  [[nodiscard]] Unit& unit(int index) { return *units_[static_cast<size_t>(index)]; }
  [[nodiscard]] State& state(int index) { return states_[static_cast<size_t>(index)]; }
  // Where accumulated is written: on compute where nothing moves.
  [[nodiscard]] Stream& accumulation_stream(const Unit& unit);
  void reduce_accumulated_block(int index);
  // `first`: the stream that uses it first.
  [[nodiscard]] at::Tensor gradient_block(int index, Stream& first);
  void reduce_to_block(int index, int slot, const std::vector<at::Tensor>& regions);
  void reduce_to_shard(int index, int slot, const std::vector<at::Tensor>& regions);
  [[nodiscard]] const at::Tensor& factor_of(double factor, const at::Tensor& like);
  void zero_gaps(const Unit& unit, const at::Tensor& block);

  const std::vector<std::shared_ptr<Unit>>& units_;
  RuntimeStreams& streams_;
  StepDigest& digest_;
  RuntimeMemory* memory_ = nullptr;
  std::vector<State> states_;
  std::vector<Factor> factors_;  // that were met: one, or a few
  std::unique_ptr<Event> gradients_ready_;
  std::vector<InFlight> in_flight_;
  size_t next_ = 0;
};

}  // namespace mics
