#include "mics/model/step_model.h"

#include <algorithm>
#include <span>

#include "model/step_queues.h"
#include "plan/check.h"

namespace mics {
namespace {

constexpr int kSimulatedMicrosteps = 4;
// Adam in fp32: reads weight, gradient and two moments, writes weight and moments.
constexpr double kOptimizerBytesPerParameter = 28;

// Seconds of each hop of one unit.
struct HopSeconds {
  double gather_rail = 0;
  double gather_intra = 0;
  double reduce_intra = 0;
  double reduce_rail = 0;
  double replicate = 0;
};

// By the table inside it; outside by the formula, scaled to join the table if there is one.
template <typename Formula>
double seconds_of(const MeasuredTable& table, const Formula& formula, int num_ranks, double nbytes,
                  bool& is_extrapolated) {
  if (table.empty()) return formula(num_ranks, nbytes);
  const MeasuredTable::Reading reading = table.read(num_ranks, nbytes);
  if (reading.is_inside(num_ranks, nbytes)) return reading.seconds;
  is_extrapolated = true;
  return reading.seconds * formula(num_ranks, nbytes) / formula(reading.num_ranks, reading.nbytes);
}

class UnitPricer {
 public:
  UnitPricer(const Cluster& cluster, const StepSettings& settings)
      : cluster_(cluster), settings_(settings) {}

  HopSeconds price(double numel) {
    HopSeconds seconds;
    if (numel == 0) return seconds;
    const double parameters = numel * settings_.parameter_nbytes;
    const double gradients = numel * settings_.gradient_nbytes;
    hops(settings_.gather, parameters, seconds.gather_rail, seconds.gather_intra);
    const Machine& machine = cluster_.machine;
    const int replicas = settings_.world_size / settings_.partition_size;
    if (settings_.sync == GradientSync::kAllReduceEach) {
      seconds.replicate = mics::replicate_seconds(machine, 1, settings_.world_size, gradients);
      return seconds;
    }
    hops(settings_.reduce, gradients, seconds.reduce_rail, seconds.reduce_intra);
    seconds.replicate = mics::replicate_seconds(machine, settings_.partition_size, replicas,
                                                numel * settings_.replicate_nbytes);
    return seconds;
  }

  [[nodiscard]] bool is_extrapolated() const { return is_extrapolated_; }

 private:
  void hops(Variant variant, double nbytes, double& rail, double& intra) {
    const Machine& machine = cluster_.machine;
    const int p = settings_.partition_size;
    const bool is_inside_node = p <= machine.ranks_per_node;
    if (variant == Variant::kFlat && !is_inside_node) {
      rail = flat_seconds(cluster_, p, nbytes, is_extrapolated_);
      return;
    }
    if (!is_inside_node) {
      const auto formula = [&](int n, double b) { return rail_hop_seconds(machine, n, b); };
      rail = seconds_of(cluster_.rail_hop, formula, p, nbytes, is_extrapolated_);
    }
    const auto formula = [&](int n, double b) { return intra_hop_seconds(machine, n, b); };
    const int local = std::min(p, machine.ranks_per_node);
    if (local > 1) intra = seconds_of(cluster_.intra_hop, formula, local, nbytes, is_extrapolated_);
  }

  const Cluster& cluster_;
  const StepSettings& settings_;
  bool is_extrapolated_ = false;
};

}  // namespace

void check_step(const Workload& workload, const Cluster& cluster, const StepSettings& settings) {
  check_workload(workload);
  const int n = settings.world_size;
  const int p = settings.partition_size;
  const int local = std::min(n, cluster.machine.ranks_per_node);
  const bool is_legal =
      n >= 1 && p >= 1 && local >= 1 && n % p == 0 && (local % p == 0 || p % local == 0);
  MICS_CHECK(is_legal, "partition_size must be legal for the cluster: got partition_size=", p,
             ", world_size=", n, ", ranks_per_node=", cluster.machine.ranks_per_node, ". Use ",
             join_or(Topology::legal_partition_sizes(n, local)), ".");
  MICS_CHECK(settings.num_microsteps >= 1 && settings.micro_batch >= 1,
             "a step needs micro-steps and samples: got num_microsteps=", settings.num_microsteps,
             ", micro_batch=", settings.micro_batch, ".");
  MICS_CHECK(settings.prefetch_intra >= 0 && settings.prefetch_intra <= settings.prefetch_rail,
             "prefetch_intra must be from 0 to prefetch_rail: got prefetch_intra=",
             settings.prefetch_intra, ", prefetch_rail=", settings.prefetch_rail, ".");
  MICS_CHECK(cluster.peak_flops > 0 && cluster.efficiency > 0 && cluster.memory_bandwidth > 0,
             "the speed of a rank must be above 0: got peak_flops=", cluster.peak_flops,
             ", efficiency=", cluster.efficiency, ", memory_bandwidth=", cluster.memory_bandwidth,
             ".");
}

namespace {

// Builds the operations of a step's micro-steps, at most kSimulatedMicrosteps of them, the last of
// which is the step's last. Its sums are those of the whole step.
class StepBuilder {
 public:
  StepBuilder(const Workload& workload, const Cluster& cluster, const StepSettings& settings)
      : settings_(settings) {
    UnitPricer pricer(cluster, settings);
    const double speed = cluster.peak_flops * cluster.efficiency;
    for (const UnitWork& unit : workload.units) {
      const HopSeconds hops = pricer.price(static_cast<double>(unit.numel));
      const double forward = unit.forward_flops * settings.micro_batch / speed;
      const double backward = forward * (settings.recompute && unit.can_recompute ? 3 : 2);
      units_.push_back({hops, forward, backward, unit.num_units});
    }
    is_extrapolated_ = pricer.is_extrapolated();
    const int replicas = settings.world_size / settings.partition_size;
    replicate_is_intra_ =
        settings.sync == GradientSync::kAllReduceEach
            ? settings.world_size <= cluster.machine.ranks_per_node
            : settings.partition_size * replicas <= cluster.machine.ranks_per_node;
  }

  std::vector<StepOperation> operations(int num_microsteps) const {
    std::vector<StepOperation> all;
    int count = 0;
    for (const Unit& unit : units_) count += unit.num_units;
    all.reserve(2 * static_cast<size_t>(count) * static_cast<size_t>(num_microsteps));
    const auto append = [&](const StepOperation& operation, int times) {
      all.insert(all.end(), static_cast<size_t>(times), operation);
    };
    for (int microstep = 0; microstep < num_microsteps; ++microstep) {
      for (const Unit& unit : units_) append(forward(unit, microstep), unit.num_units);
      for (size_t i = units_.size(); i-- > 0;) {
        append(backward(units_[i], microstep == num_microsteps - 1), units_[i].num_units);
      }
    }
    return all;
  }

  // Sums over all micro-steps of the step.
  StepTime sums() const {
    StepTime time;
    time.is_extrapolated = is_extrapolated_;
    const HopCounts counts = count_hops(settings_.residency, settings_.num_microsteps, 2);
    const double s = settings_.num_microsteps;
    const double replicates = settings_.sync == GradientSync::kTwoHop ? 1 : s;
    for (const Unit& unit : units_) {
      const double units = unit.num_units;
      const auto times = [&](int64_t count) { return units * static_cast<double>(count); };
      time.compute += s * units * (unit.forward + unit.backward);
      time.gather_rail += times(counts.gather_rail) * unit.hops.gather_rail;
      time.gather_intra += times(counts.gather_intra) * unit.hops.gather_intra;
      time.reduce_intra += times(counts.reduce_intra) * unit.hops.reduce_intra;
      time.reduce_rail += times(counts.reduce_rail) * unit.hops.reduce_rail;
      time.replicate += replicates * units * unit.hops.replicate;
    }
    return time;
  }

  [[nodiscard]] bool replicate_is_intra() const { return replicate_is_intra_; }

 private:
  struct Unit {
    HopSeconds hops;
    double forward;
    double backward;
    int num_units;
  };

  // The same rules as count_hops().
  void add_gather(StepOperation& operation, const Unit& unit, Residency at_hand) const {
    if (at_hand == Residency::kShard) operation.gather_rail = unit.hops.gather_rail;
    if (at_hand != Residency::kFull) operation.gather_intra = unit.hops.gather_intra;
  }

  StepOperation forward(const Unit& unit, int microstep) const {
    StepOperation operation;
    operation.compute = unit.forward;
    const Residency kept = settings_.residency.between_microsteps;
    add_gather(operation, unit, microstep == 0 ? Residency::kShard : kept);
    return operation;
  }

  StepOperation backward(const Unit& unit, bool is_last) const {
    const ResidencySettings& residency = settings_.residency;
    StepOperation operation;
    operation.compute = unit.backward;
    operation.replicate_is_intra = replicate_is_intra_;
    add_gather(operation, unit, std::max(residency.after_forward, residency.between_microsteps));
    const Residency sums = residency.gradient_accumulation;
    if (is_last || sums != Residency::kFull) operation.reduce_intra = unit.hops.reduce_intra;
    if (is_last || sums == Residency::kShard) operation.reduce_rail = unit.hops.reduce_rail;
    const bool is_boundary = is_last && settings_.overlap_replicate;
    if (is_boundary || settings_.sync != GradientSync::kTwoHop) {
      operation.replicate = unit.hops.replicate;
    }
    return operation;
  }

  const StepSettings& settings_;
  std::vector<Unit> units_;
  bool is_extrapolated_ = false;
  bool replicate_is_intra_ = false;
};

double optimizer_seconds(const Workload& workload, const Cluster& cluster,
                         const StepSettings& settings) {
  return static_cast<double>(workload.numel()) / settings.partition_size *
         kOptimizerBytesPerParameter / cluster.memory_bandwidth;
}

// Seconds of the busier of the two communication queues over `operations`.
double longest_queue(std::span<const StepOperation> operations) {
  double network = 0;
  double intra = 0;
  for (const StepOperation& operation : operations) {
    network += operation.gather_rail + operation.reduce_rail;
    intra += operation.gather_intra + operation.reduce_intra;
    (operation.replicate_is_intra ? intra : network) += operation.replicate;
  }
  return std::max(network, intra);
}

}  // namespace

double flat_seconds(const Cluster& cluster, int num_ranks, double nbytes, bool& is_extrapolated) {
  const auto formula = [&](int n, double b) { return flat_seconds(cluster.machine, n, b); };
  return seconds_of(cluster.flat, formula, num_ranks, nbytes, is_extrapolated);
}

StepTime step_time(const Workload& workload, const Cluster& cluster, const StepSettings& settings) {
  check_step(workload, cluster, settings);
  const StepBuilder builder(workload, cluster, settings);
  StepTime time = builder.sums();
  time.optimizer = optimizer_seconds(workload, cluster, settings);
  if (!settings.overlap) {
    time.exposed = time.gather_rail + time.gather_intra + time.reduce_intra + time.reduce_rail +
                   time.replicate;
    time.total = time.compute + time.exposed + time.optimizer;
    return time;
  }
  const int simulated = std::min(settings.num_microsteps, kSimulatedMicrosteps);
  const std::vector<StepOperation> operations = builder.operations(simulated);
  const QueueTimes queues =
      run_queues(operations, {settings.prefetch_rail, settings.prefetch_intra, cluster.contention});
  double boundary = 0;
  if (!settings.overlap_replicate && settings.sync == GradientSync::kTwoHop) {
    boundary = time.replicate;
  }
  const size_t per_microstep = operations.size() / static_cast<size_t>(simulated);
  const auto of_third = [&](const std::vector<double>& ends) {
    return ends[3 * per_microstep - 1] - ends[2 * per_microstep - 1];
  };
  const double repeats = settings.num_microsteps - simulated;
  time.total = queues.total + boundary + time.optimizer;
  double busy = queues.compute_busy;
  if (repeats > 0) {
    // If reductions pile up behind compute, the busiest queue sets the pace.
    const auto third = std::span(operations).subspan(2 * per_microstep, per_microstep);
    time.total += repeats * std::max(of_third(queues.compute_ends), longest_queue(third));
    busy += repeats * of_third(queues.busy_at_ends);
  }
  time.contention = std::max(0.0, busy - time.compute);
  time.exposed = std::max(0.0, time.total - time.compute - time.contention - time.optimizer);
  return time;
}

double step_time_bound(const Workload& workload, const Cluster& cluster,
                       const StepSettings& settings) {
  check_step(workload, cluster, settings);
  const StepBuilder builder(workload, cluster, settings);
  const StepTime time = builder.sums();
  double network = time.gather_rail + time.reduce_rail;
  double intra = time.gather_intra + time.reduce_intra;
  (builder.replicate_is_intra() ? intra : network) += time.replicate;
  const double optimizer = optimizer_seconds(workload, cluster, settings);
  if (!settings.overlap) return time.compute + network + intra + optimizer;
  return std::max({time.compute, network, intra}) + optimizer;
}

}  // namespace mics
