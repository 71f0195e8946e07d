// Memory model: the bytes that one rank holds at its fullest moment, term by term.
//
//   states           state_nbytes * N/p: shard, gradient shard, optimizer
//   parameters kept  node blocks (1/L of the model) or everything, by residency
//   gradients kept   the same for sums between micro-steps, in 4 bytes
//   gathered         the unit in use and those gathered ahead
//   staging          node blocks of the units gathered ahead (hierarchical, when none are kept)
//   unit gradients   of the unit whose backward runs
//   activations      inputs of recomputed units, all saved tensors of others
//   recomputation    the saved tensors of the unit that is recomputed
//   head             logits, gone before the deepest recomputation
//   communicators    buffers of each communicator; context is what the device takes by itself
//
// The peak is the larger of two phases, the end of forward and the deepest backward, and not the
// sum of all terms. Sources: the memory rules of the MiCS paper and Megatron-LM (mics/model/workload.h).
//
// Thread safety: functions without state.
#pragma once

#include "mics/model/step_model.h"

namespace mics {

struct MemoryLimits {
  double capacity_nbytes = 0;  // of one rank's device
  double usable = 0.96;        // share of it that fragmentation leaves
  double context_nbytes = 0;
  double communicator_nbytes = 0;
  double state_nbytes = 16;  // per parameter: 4 + 4 + 8 in fp32 with Adam, or 2 + 2 + 12
  double bucket_nbytes = 0;  // of fixed reduce buckets, where the system has them
};

// Bytes. `peak` is the larger of the two phases.
struct MemoryTerms {
  double states = 0;
  double parameters_kept = 0;
  double gradients_kept = 0;
  double gathered = 0;
  double staging = 0;
  double unit_gradients = 0;
  double activations = 0;
  double recomputation = 0;
  double head = 0;
  double communicators = 0;  // with context and buckets
  double forward_end = 0;
  double backward = 0;
  double peak = 0;
};

// Throws as step_time; also for limits that are negative or a usable share outside (0, 1].
[[nodiscard]] MemoryTerms step_memory(const Workload& workload, const Cluster& cluster,
                                      const StepSettings& settings, const MemoryLimits& limits);

[[nodiscard]] bool fits(const MemoryTerms& memory, const MemoryLimits& limits);

// Communicators that the collectives of one rank need: one per group and direction, and control.
[[nodiscard]] int count_communicators(const Machine& machine, const StepSettings& settings);

}  // namespace mics
