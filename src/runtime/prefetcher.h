// Prefetcher: decides which unit is gathered when, and starts its gathers in GatherPipeline.
//
// Policy, whenever a unit is used:
//   1. the unit itself: both hops, if they have not been started
//   2. the units of its explicit list, if it has one: both hops, kept until they are used
//   3. else the next units of the recorded ExecutionOrder: hop 2 of `depths.intra` units, then hop 1
//      of `depths.rail` units, as far as slots are free. Units that stay unsharded are passed over.
//      Past the end of the phase it goes on with the phase that followed the last time, where the
//      weights do not change in between; never with a unit in use that will be gathered again.
//   4. compute waits for the unit itself
//
// Another order than recorded frees what was prefetched for it. After its use a unit is kept when
// the recorded order uses it again within `depths.intra` units of the phase.
//
// Decided by the sequence of calls and the units' settings alone: ranks that make the same calls
// start the same gathers in the same order.
//
// Thread safety: one thread at a time.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "mics/prefetch.h"
#include "mics/unit.h"
#include "plan/execution_order.h"
#include "runtime/gather_pipeline.h"

namespace mics {

class Prefetcher {
 public:
  // Both outlive the prefetcher.
  Prefetcher(const std::vector<std::shared_ptr<Unit>>& units, GatherPipeline& gathers,
             const Depths& depths);

  void set_depths(const Depths& depths);
  // Units to gather as soon as `unit` is used in a phase, in this order. Empty: the recorded ones.
  void set_list(Phase phase, int unit, std::vector<int> ahead);

  // A phase begins. `looks_past`: the weights do not change before the phase that follows.
  void begin(Phase phase, bool looks_past) { order_.begin(phase, looks_past); }
  void end();
  [[nodiscard]] bool is_open(Phase phase) const { return order_.is_open(phase); }

  // `unit` is used now: in use when this returns.
  void use(int unit);
  // Steps 2 and 3 alone, for a unit that is not gathered here.
  void pass(int unit);
  // Prefetches `unit`, by an explicit request: kept until it is used.
  void prefetch(int unit);
  // The use of `unit` ends, and it keeps what `residency` says.
  void rest(int unit, Residency residency);
  // The outermost forward is about to end: prefetches what its backward uses first, when the
  // recorded forward has no more uses.
  void look_past_forward();

  // Times that units were used in another order than recorded.
  [[nodiscard]] int64_t num_order_changes() const { return order_.num_changes(); }
  // Forgets the recorded orders.
  void forget() { order_.forget(); }

 private:
  void start_recorded();
  [[nodiscard]] const std::vector<int>& upcoming(int depth);
  [[nodiscard]] bool stays_full(int unit) const;

  const std::vector<std::shared_ptr<Unit>>& units_;
  GatherPipeline& gathers_;
  Depths depths_;
  ExecutionOrder order_;
  std::array<std::vector<std::vector<int>>, 2> lists_;  // by phase and unit
  std::vector<int> upcoming_;                           // what upcoming() gave
};

}  // namespace mics
