#include "mics/model/cost_model.h"

#include <algorithm>
#include <cmath>

#include "plan/check.h"

namespace mics {

HopCounts count_hops(const ResidencySettings& residency, int num_microsteps, int replication_size) {
  MICS_CHECK(num_microsteps >= 1,
             "num_microsteps must be at least 1: got num_microsteps=", num_microsteps, ".");
  MICS_CHECK(replication_size >= 1,
             "replication_size must be at least 1: got replication_size=", replication_size, ".");
  // What is kept for the next micro-step is there in this one's backward too.
  const Residency after_forward = std::max(residency.after_forward, residency.between_microsteps);
  HopCounts counts;
  Residency at_hand = Residency::kShard;
  const auto use = [&] {
    if (at_hand == Residency::kShard) ++counts.gather_rail;
    if (at_hand != Residency::kFull) ++counts.gather_intra;
  };
  for (int microstep = 0; microstep < num_microsteps; ++microstep) {
    use();
    at_hand = after_forward;
    use();
    at_hand = residency.between_microsteps;
    const bool is_last = microstep == num_microsteps - 1;
    // A gradient kept full is reduced once; one kept as a block crosses the nodes once.
    if (is_last || residency.gradient_accumulation != Residency::kFull) ++counts.reduce_intra;
    if (is_last || residency.gradient_accumulation == Residency::kShard) ++counts.reduce_rail;
  }
  counts.replicate = replication_size > 1 ? 1 : 0;
  return counts;
}

StepBytes step_bytes(const UnitSize& unit, const Topology::Shape& shape, int replication_size,
                     const HopCounts& hops) {
  MICS_CHECK(shape.num_nodes >= 1 && shape.ranks_per_node >= 1,
             "a group shape must be at least 1 by 1: got num_nodes=", shape.num_nodes,
             ", ranks_per_node=", shape.ranks_per_node, ".");
  MICS_CHECK(replication_size >= 1,
             "replication_size must be at least 1: got replication_size=", replication_size, ".");
  const int64_t rail = shape.num_nodes - 1;
  const int64_t intra = int64_t{shape.num_nodes} * (shape.ranks_per_node - 1);
  const int64_t replicas = replication_size;
  const int64_t piece = (unit.gradient_shard_numel + replicas - 1) / replicas;
  StepBytes bytes;
  bytes.gather_rail = hops.gather_rail * rail * unit.shard_numel * unit.parameter_nbytes;
  bytes.gather_intra = hops.gather_intra * intra * unit.payload_numel * unit.parameter_nbytes;
  bytes.reduce_rail = hops.reduce_rail * rail * unit.gradient_shard_numel * unit.gradient_nbytes;
  bytes.reduce_intra =
      hops.reduce_intra * intra * unit.gradient_payload_numel * unit.gradient_nbytes;
  bytes.replicate = hops.replicate * 2 * (replicas - 1) * piece * unit.replicate_nbytes;
  return bytes;
}

namespace {

void check_collective(const Machine& machine, int num_ranks, double nbytes) {
  MICS_CHECK(machine.ranks_per_node >= 1,
             "ranks_per_node must be at least 1: got ranks_per_node=", machine.ranks_per_node, ".");
  MICS_CHECK(machine.intra.bandwidth > 0 && machine.inter.bandwidth > 0,
             "a bandwidth must be above 0: got intra=", machine.intra.bandwidth,
             ", inter=", machine.inter.bandwidth, " bytes/s.");
  MICS_CHECK(machine.intra.latency >= 0 && machine.inter.latency >= 0 && machine.launch >= 0 &&
                 machine.rail_launch >= 0,
             "a latency must not be negative: got intra=", machine.intra.latency,
             ", inter=", machine.inter.latency, ", launch=", machine.launch,
             ", rail_launch=", machine.rail_launch, " s.");
  MICS_CHECK(num_ranks >= 1 && nbytes >= 0,
             "a collective needs at least one rank and no negative size: got num_ranks=", num_ranks,
             ", nbytes=", nbytes, ".");
  MICS_CHECK(num_ranks <= machine.ranks_per_node || num_ranks % machine.ranks_per_node == 0,
             "a group over several nodes must fill them: got num_ranks=", num_ranks,
             ", ranks_per_node=", machine.ranks_per_node, ".");
}

}  // namespace

double flat_seconds(const Machine& machine, int num_ranks, double nbytes) {
  check_collective(machine, num_ranks, nbytes);
  if (num_ranks <= machine.ranks_per_node) return intra_hop_seconds(machine, num_ranks, nbytes);
  const int num_nodes = num_ranks / machine.ranks_per_node;
  return machine.launch + (num_ranks - num_nodes) * machine.intra.latency +
         (num_nodes - 1) * machine.inter.latency +
         (num_ranks - 1) * nbytes / num_ranks / machine.inter.bandwidth;
}

double rail_hop_seconds(const Machine& machine, int num_ranks, double nbytes) {
  check_collective(machine, num_ranks, nbytes);
  if (num_ranks <= machine.ranks_per_node) return 0;
  const int num_nodes = num_ranks / machine.ranks_per_node;
  return machine.rail_launch + (num_nodes - 1) * machine.inter.latency +
         (num_ranks - machine.ranks_per_node) * nbytes / num_ranks / machine.inter.bandwidth;
}

double intra_hop_seconds(const Machine& machine, int num_ranks, double nbytes) {
  check_collective(machine, num_ranks, nbytes);
  const int local = std::min(num_ranks, machine.ranks_per_node);
  return (local - 1) * machine.intra.latency +
         (local - 1) * nbytes / local / machine.intra.bandwidth;
}

double replicate_seconds(const Machine& machine, int partition_size, int replication_size,
                         double nbytes) {
  check_collective(machine, partition_size, nbytes);
  MICS_CHECK(replication_size >= 1,
             "replication_size must be at least 1: got replication_size=", replication_size, ".");
  check_collective(machine, partition_size * replication_size, nbytes);
  if (replication_size == 1) return 0;
  const double replicas = replication_size;
  const double shard_nbytes = nbytes / partition_size;
  const int per_node = std::max(1, machine.ranks_per_node / partition_size);
  const int num_nodes = replication_size / std::min(replication_size, per_node);
  // Replicas on one node reduce over its own links.
  if (num_nodes == 1) {
    return 2 * (replicas - 1) *
           (machine.intra.latency + shard_nbytes / replicas / machine.intra.bandwidth);
  }
  const double ring =
      (replicas - num_nodes) * machine.intra.latency + (num_nodes - 1) * machine.inter.latency;
  const double tree = (per_node - 1) * machine.intra.latency +
                      std::ceil(std::log2(num_nodes)) * machine.inter.latency;
  const int rings_per_node = std::min(partition_size, machine.ranks_per_node);
  return machine.launch + 2 * std::min(ring, tree) +
         2 * (replicas - 1) / replicas * rings_per_node * shard_nbytes / machine.inter.bandwidth;
}

}  // namespace mics
