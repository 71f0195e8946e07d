#include "mics/model/memory_model.h"

#include <algorithm>

#include "plan/check.h"

namespace mics {
namespace {

constexpr double kSumNbytes = 4;  // gradients are summed in fp32

double real(int64_t value) { return static_cast<double>(value); }

// Share of the full tensor that `residency` keeps on one rank beside its shard.
double kept_share(Residency residency, int ranks_per_group_node, bool has_blocks) {
  switch (residency) {
    case Residency::kShard:
      return 0;
    case Residency::kBlock:
      return has_blocks ? 1.0 / ranks_per_group_node : 0;
    case Residency::kFull:
      return 1;
  }
  return 0;
}

void check_limits(const MemoryLimits& limits) {
  MICS_CHECK(limits.capacity_nbytes > 0 && limits.usable > 0 && limits.usable <= 1,
             "a memory limit must be above 0 and its usable share at most 1: got capacity_nbytes=",
             limits.capacity_nbytes, ", usable=", limits.usable, ".");
  MICS_CHECK(limits.context_nbytes >= 0 && limits.communicator_nbytes >= 0 &&
                 limits.state_nbytes >= 0 && limits.bucket_nbytes >= 0,
             "memory terms must not be negative: got context_nbytes=", limits.context_nbytes,
             ", communicator_nbytes=", limits.communicator_nbytes,
             ", state_nbytes=", limits.state_nbytes, ", bucket_nbytes=", limits.bucket_nbytes, ".");
}

// Adds what backward needs: saved tensors, recomputation, the head.
void add_activations(const Workload& workload, const StepSettings& settings, MemoryTerms& terms) {
  const double samples = settings.micro_batch;
  for (const UnitWork& unit : workload.units) {
    const bool recomputed = settings.recompute && unit.can_recompute;
    terms.activations +=
        samples * unit.num_units * (recomputed ? unit.input_nbytes : unit.saved_nbytes);
    if (recomputed) {
      terms.recomputation = std::max(terms.recomputation, samples * unit.saved_nbytes);
    }
    terms.head = std::max(terms.head, samples * unit.transient_nbytes);
  }
}

}  // namespace

int count_communicators(const Machine& machine, const StepSettings& settings) {
  const int p = settings.partition_size;
  const bool spans_nodes = p > machine.ranks_per_node;
  const auto per_direction = [&](Variant variant) {
    if (p == 1) return 0;
    return spans_nodes && variant == Variant::kHierarchical ? 2 : 1;
  };
  const int control = settings.world_size > 1 ? 1 : 0;
  const int replicate = settings.world_size > p ? 1 : 0;
  return per_direction(settings.gather) + per_direction(settings.reduce) + replicate + control;
}

MemoryTerms step_memory(const Workload& workload, const Cluster& cluster,
                        const StepSettings& settings, const MemoryLimits& limits) {
  check_step(workload, cluster, settings);
  check_limits(limits);
  const double numel = real(workload.numel());
  const double largest = real(workload.largest_numel());
  const int p = settings.partition_size;
  const int local = std::min(p, cluster.machine.ranks_per_node);
  const bool has_blocks =
      p > cluster.machine.ranks_per_node && settings.gather == Variant::kHierarchical;
  const bool has_gradient_blocks =
      p > cluster.machine.ranks_per_node && settings.reduce == Variant::kHierarchical;
  const ResidencySettings& residency = settings.residency;
  const Residency kept = std::max(residency.after_forward, residency.between_microsteps);
  const double wire = settings.parameter_nbytes;
  const int ahead_intra = std::min(1 + settings.prefetch_intra, workload.num_units());
  const int ahead_rail = std::min(1 + settings.prefetch_rail, workload.num_units());

  MemoryTerms terms;
  terms.states = limits.state_nbytes * numel / p;
  terms.parameters_kept = p == 1 ? 0 : kept_share(kept, local, has_blocks) * numel * wire;
  if (settings.num_microsteps > 1 && p > 1) {
    terms.gradients_kept = kept_share(residency.gradient_accumulation, local, has_gradient_blocks) *
                           numel * kSumNbytes;
  }
  if (kept != Residency::kFull) terms.gathered = ahead_intra * largest * wire;
  if (has_blocks && kept == Residency::kShard) {
    terms.staging = ahead_rail * largest * wire / local;
  }
  terms.unit_gradients = largest * settings.gradient_nbytes;
  add_activations(workload, settings, terms);
  terms.communicators = limits.context_nbytes + limits.bucket_nbytes +
                        count_communicators(cluster.machine, settings) * limits.communicator_nbytes;

  const double always = terms.states + terms.parameters_kept + terms.gradients_kept +
                        terms.gathered + terms.staging + terms.activations + terms.communicators;
  terms.forward_end = always + terms.head;
  terms.backward = always + terms.unit_gradients + terms.recomputation;
  terms.peak = std::max(terms.forward_end, terms.backward);
  return terms;
}

bool fits(const MemoryTerms& memory, const MemoryLimits& limits) {
  return memory.peak <= limits.usable * limits.capacity_nbytes;
}

}  // namespace mics
