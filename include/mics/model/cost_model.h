// Cost model: what one optimizer step moves, and what a collective costs. Pure arithmetic.
//
// Bytes are exact: they equal what the communicators of a run count (docs/backends.md). Seconds are
// predictions: latency per step of the algorithm plus bytes over bandwidth.
//
//   per unit, N nodes of L ranks, shard of S elements (payload Q), R replicas, s micro-steps
//     gather  hop 1 (rail)  (N-1)*S      hop 2 (intra)  N*(L-1)*Q      flat: N = 1, L = p
//     reduce  hop 1 (intra) N*(L-1)*Q    hop 2 (rail)   (N-1)*S
//     replicate, once       2*(R-1)*ceil(S/R)
//
// Thread safety: functions without state. Source: MiCS paper section 3; the formulas of NCCL's
// ring.
#pragma once

#include <cstdint>

#include "mics/residency.h"
#include "mics/topology.h"

namespace mics {

// How often each hop of one unit runs in one step.
struct HopCounts {
  int64_t gather_rail = 0;
  int64_t gather_intra = 0;
  int64_t reduce_intra = 0;
  int64_t reduce_rail = 0;
  int64_t replicate = 0;
};

// Counts the hops of a step of `num_microsteps`, each one forward and one backward.
// `replication_size` 1 has nothing to replicate. Throws InvalidArgument for num_microsteps < 1 or
// replication_size < 1.
[[nodiscard]] HopCounts count_hops(const ResidencySettings& residency, int num_microsteps,
                                   int replication_size);

// A unit as the byte terms see it; lengths are those of ShardLayout.
struct UnitSize {
  int64_t shard_numel = 0;             // S of the parameters
  int64_t payload_numel = 0;           // Q of the parameters
  int64_t gradient_shard_numel = 0;    // S of the trainable parameters
  int64_t gradient_payload_numel = 0;  // Q of the trainable parameters
  int64_t parameter_nbytes = 2;        // of one element on the wire, in gathers
  int64_t gradient_nbytes = 4;         // in reductions over the partition group
  int64_t replicate_nbytes = 4;        // in the all-reduce over replicas
};

// Bytes that one rank receives in one step, by communicator. It sends as many.
struct StepBytes {
  int64_t gather_rail = 0;
  int64_t gather_intra = 0;
  int64_t reduce_rail = 0;
  int64_t reduce_intra = 0;
  int64_t replicate = 0;
};

// Bytes of one unit. `shape` is Topology::shape() of the variant. Throws as count_hops; also for a
// shape below 1.
[[nodiscard]] StepBytes step_bytes(const UnitSize& unit, const Topology::Shape& shape,
                                   int replication_size, const HopCounts& hops);

// One tier of the network as a collective meets it.
struct Link {
  double latency = 0;    // seconds per step of the algorithm
  double bandwidth = 1;  // bytes per second: of one rank inside a node, of one node between nodes
};

struct Machine {
  int ranks_per_node = 1;
  double launch = 0;       // seconds before the first byte of a flat collective over nodes
  double rail_launch = 0;  // the same, of one hop over nodes
  Link intra;
  Link inter;
};

// How queues slow each other down while both are busy: an operation takes 1 + x times as long.
struct Contention {
  double compute_by_network = 0;
  double compute_by_intra = 0;
  double network_by_compute = 0;
};

// Seconds of one all-gather or reduce-scatter in which every rank ends, or begins, with `nbytes`.
//   inside a node      (p-1)*a_intra + (p-1)/p * nbytes/B_intra
//   flat over nodes    launch + (p-m)*a_intra + (m-1)*a_inter + (p-1)/p * nbytes/B_inter   (ring)
//   hop over nodes     rail_launch + (m-1)*a_inter + (p-k)/p * nbytes/B_inter   (k parallel rings)
//   hop inside nodes   (k-1)*a_intra + (k-1)/k * nbytes/B_intra
// with p ranks, k of them on each of m = p/k nodes.
// Throws InvalidArgument for num_ranks < 1, nbytes < 0, a bandwidth <= 0, a latency < 0, or ranks
// that do not fill whole nodes.
[[nodiscard]] double flat_seconds(const Machine& machine, int num_ranks, double nbytes);
[[nodiscard]] double rail_hop_seconds(const Machine& machine, int num_ranks, double nbytes);
[[nodiscard]] double intra_hop_seconds(const Machine& machine, int num_ranks, double nbytes);

// Seconds of the all-reduce of every shard of a unit of `nbytes` over the replicas, all ranks of a
// node at once: 2(R-1)/R of ranks_per_node * nbytes/p bytes per node, and the steps of a ring or of
// a double tree, whichever is less. Partition groups smaller than a node keep part of the replicas
// inside it; their bytes across nodes are those of the nodes' ring.
// Throws as flat_seconds, for the partition group and for all its replicas.
[[nodiscard]] double replicate_seconds(const Machine& machine, int partition_size,
                                       int replication_size, double nbytes);

}  // namespace mics
