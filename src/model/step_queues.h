// StepQueues: runs the operations of a step through its queues. See mics/model/step_model.h.
#pragma once

#include <vector>

#include "mics/model/cost_model.h"

namespace mics {

// One forward or backward of one unit, and what is communicated for it; seconds, 0: nothing to do.
struct StepOperation {
  double compute = 0;
  double gather_rail = 0;
  double gather_intra = 0;
  double reduce_intra = 0;
  double reduce_rail = 0;
  double replicate = 0;
  bool replicate_is_intra = false;
  // Its gather is passed over until the operation before it with the same number has ended: a unit
  // has one place to be gathered to. -1: it waits for none.
  int unit = -1;
};

struct QueueOptions {
  int prefetch_rail = 0;
  int prefetch_intra = 0;
  Contention contention;
  // As the engine does it, and not as step_model.h says: gathers ahead of an operation are queued
  // when the one before it has ended, before its own gather is over; and what needs no gather is
  // not counted.
  bool as_engine = false;
};

struct QueueTimes {
  double total = 0;                  // when the last queue is empty
  double compute_busy = 0;           // seconds in which something was computed
  std::vector<double> compute_ends;  // by operation
  std::vector<double> busy_at_ends;  // compute_busy at those times
};

[[nodiscard]] QueueTimes run_queues(const std::vector<StepOperation>& operations,
                                    const QueueOptions& options);

}  // namespace mics
