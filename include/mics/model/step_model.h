// Time model: the seconds of one optimizer step, by list scheduling over three queues.
//
//   compute   F0 F1 ... F(U-1) B(U-1) ... B1 B0, s times       starts when its unit is gathered
//   network   first hops of gathers, second hops of reductions, flat collectives over nodes,
//             all-reduces over replicas
//   intra     second hops of gathers, first hops of reductions, collectives inside one node
//
// Each queue runs one operation at a time, first come, first served. When unit i starts, hop 1 of
// the gather of unit i + prefetch_rail and hop 2 of unit i + prefetch_intra are queued; hop 2 waits
// for its hop 1. A reduction is queued when its backward ends, its hop 2 when its hop 1 ends, and
// the all-reduce over replicas when the last micro-step's hop 2 ends. Queues slow each other down
// as Contention says. More than four micro-steps repeat the third.
//
// What it leaves out: skew between ranks, host time per launch, other jobs on the network.
// Thread safety: functions without state.
#pragma once

#include "mics/model/cost_model.h"
#include "mics/model/measured_table.h"
#include "mics/model/workload.h"
#include "mics/topology.h"

namespace mics {

// One instance type, calibrated.
struct Cluster {
  Machine machine;
  // Where not empty, read instead of the formula; outside, the formula scaled to join the table.
  MeasuredTable flat;
  MeasuredTable rail_hop;
  MeasuredTable intra_hop;
  Contention contention;
  double peak_flops = 1;        // of one rank, per second
  double efficiency = 1;        // of peak_flops, for this workload
  double memory_bandwidth = 1;  // bytes per second of one rank; prices the optimizer
};

enum class GradientSync {
  kTwoHop,         // over the partition group every micro-step, over replicas at the boundary
  kReplicateEach,  // both every micro-step, as HSDP without deferral
  kAllReduceEach,  // one all-reduce over all ranks every micro-step
};

struct StepSettings {
  int world_size = 1;
  int partition_size = 1;
  Variant gather = Variant::kFlat;
  Variant reduce = Variant::kFlat;
  ResidencySettings residency;
  int prefetch_rail = 2;   // units ahead
  int prefetch_intra = 1;  // units ahead, at most prefetch_rail
  int num_microsteps = 1;
  int micro_batch = 1;  // samples per rank
  bool recompute = false;
  bool overlap = true;            // false: everything one after the other
  bool overlap_replicate = true;  // false: the all-reduce over replicas follows the last backward
  GradientSync sync = GradientSync::kTwoHop;
  double parameter_nbytes = 2;  // of one element on the wire
  double gradient_nbytes = 2;
  double replicate_nbytes = 2;
};

// Seconds of one step. Terms from gather_rail on are the time their queue was busy with them; most
// of it is hidden behind compute.
struct StepTime {
  double total = 0;
  double compute = 0;     // alone
  double contention = 0;  // what compute lost to busy queues
  double exposed = 0;     // waiting for communication
  double optimizer = 0;
  double gather_rail = 0;
  double gather_intra = 0;
  double reduce_intra = 0;
  double reduce_rail = 0;
  double replicate = 0;
  bool is_extrapolated = false;  // a size outside of a measured table was needed
};

// Throws InvalidArgument for a partition_size that is not legal for the world, for counts below 1,
// prefetch_intra > prefetch_rail or below 0, and as flat_seconds and check_workload.
[[nodiscard]] StepTime step_time(const Workload& workload, const Cluster& cluster,
                                 const StepSettings& settings);

// A lower bound of step_time(): the busiest queue, without any waiting.
[[nodiscard]] double step_time_bound(const Workload& workload, const Cluster& cluster,
                                     const StepSettings& settings);

// The checks of step_time() alone.
void check_step(const Workload& workload, const Cluster& cluster, const StepSettings& settings);

// Seconds of a collective by table or formula; sets `is_extrapolated` for a size outside the table.
[[nodiscard]] double flat_seconds(const Cluster& cluster, int num_ranks, double nbytes,
                                  bool& is_extrapolated);

}  // namespace mics
