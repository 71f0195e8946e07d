// Planner: every legal way to run a workload on a cluster, within memory, fastest first.
//
// The search covers partition_size, variant, residency, prefetch, recomputation and micro-batch. A
// candidate that does not fit is dropped, and the nearest misses are kept. The rest are sorted by
// the bound of their time (the busiest queue) and simulated in that order until no bound left can
// reach the candidates found: the result is that of simulating all.
//
// Thread safety: functions without state. Deterministic: equal times keep the order of the search,
// which tries smaller partition sizes and simpler settings first.
#pragma once

#include <cstdint>
#include <vector>

#include "mics/model/memory_model.h"
#include "mics/model/step_model.h"

namespace mics {

struct PlanRequest {
  Workload workload;
  Cluster cluster;
  MemoryLimits limits;
  int world_size = 1;
  int64_t global_batch = 1;  // samples per optimizer step
  // Empty: all that the search knows. What is listed is tried, where it is legal.
  std::vector<int> partition_sizes;
  std::vector<int> micro_batches;
  std::vector<Variant> variants;
  std::vector<bool> recompute;
  bool vary_residency = true;  // false: `base.residency`
  bool vary_prefetch = true;   // false: those of `base`
  StepSettings base;           // what is not searched
  int num_ranked = 10;         // candidates in the result
};

struct Candidate {
  StepSettings settings;
  StepTime time;
  MemoryTerms memory;
};

struct PlanResult {
  // Fastest first; at most num_ranked. Empty: nothing fits.
  std::vector<Candidate> ranked;
  // The best of each partition size and variant that has one, in this order.
  std::vector<Candidate> leaders;
  // Of each partition size at which nothing fits, the candidate that needs least; `time` is not
  // set.
  std::vector<Candidate> misses;
  int num_considered = 0;
  int num_fitting = 0;
  int num_simulated = 0;
};

// Throws InvalidArgument for a global batch that no micro-batch divides over the ranks, a listed
// partition size that is not legal, num_ranked < 1, and as step_time and step_memory.
[[nodiscard]] PlanResult plan_step(const PlanRequest& request);

}  // namespace mics
