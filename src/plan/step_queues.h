// StepQueues: runs the operations of a step through its queues. See mics/step_model.h.
#pragma once

#include <vector>

#include "mics/step_model.h"

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
};

struct QueueOptions {
  int prefetch_rail = 0;
  int prefetch_intra = 0;
  Contention contention;
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
