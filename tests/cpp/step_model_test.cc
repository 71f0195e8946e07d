#include "mics/model/step_model.h"

#include <gtest/gtest.h>

#include <vector>

#include "mics/error.h"
#include "model/step_queues.h"

namespace mics {
namespace {

constexpr Residency kAll[] = {Residency::kShard, Residency::kBlock, Residency::kFull};

// 8 equal units of 1e6 parameters; forward takes 1 ms at `flops` per second.
Workload eight_units() {
  Workload workload;
  workload.units = {{.name = "unit", .num_units = 8, .numel = 1'000'000, .forward_flops = 1e9}};
  return workload;
}

Cluster cluster_of(double inter_bandwidth, double intra_bandwidth) {
  Cluster cluster;
  cluster.machine.ranks_per_node = 2;
  cluster.machine.intra = {0, intra_bandwidth};
  cluster.machine.inter = {0, inter_bandwidth};
  cluster.peak_flops = 1e12;
  cluster.memory_bandwidth = 1e30;
  return cluster;
}

StepSettings settings_of(int world_size, int partition_size, Variant variant) {
  StepSettings settings;
  settings.world_size = world_size;
  settings.partition_size = partition_size;
  settings.gather = settings.reduce = variant;
  return settings;
}

// --- the queues, by hand ---

QueueTimes run(std::vector<StepOperation> operations, int rail, int intra, Contention c = {}) {
  return run_queues(operations, {rail, intra, c});
}

TEST(StepQueues, PipelinesTheTwoHops) {
  // Three forwards of 1 s, hop 1 of 2 s, hop 2 of 1 s:
  //   network 0-2 2-4 4-6, intra 2-3 4-5 6-7, compute 3-4 5-6 7-8.
  const StepOperation operation{.compute = 1, .gather_rail = 2, .gather_intra = 1};
  EXPECT_DOUBLE_EQ(run({operation, operation, operation}, 2, 1).total, 8);
}

TEST(StepQueues, GathersAsFarAheadAsThePrefetch) {
  const StepOperation operation{.compute = 1, .gather_rail = 2};
  // Nothing ahead: network 0-2, compute 2-3, network 3-5, compute 5-6.
  EXPECT_DOUBLE_EQ(run({operation, operation}, 0, 0).total, 6);
  // One ahead: network 0-2 2-4, compute 2-3 4-5.
  EXPECT_DOUBLE_EQ(run({operation, operation}, 1, 1).total, 5);
  // Hop 1 may be further ahead than hop 2: network 0-2 2-4, intra 2-4 and, after compute 4-5, 5-7.
  const StepOperation both{.compute = 1, .gather_rail = 2, .gather_intra = 2};
  EXPECT_DOUBLE_EQ(run({both, both}, 1, 0).total, 8);
  EXPECT_DOUBLE_EQ(run({both, both}, 1, 1).total, 7);
}

// As the engine runs: prefetch counts what is gathered, and begins with the end of what was before.
TEST(StepQueues, AsTheEngineCountsGathersOnly) {
  const StepOperation gathered{.compute = 1, .gather_rail = 2};
  const StepOperation at_hand{.compute = 1};
  const std::vector<StepOperation> step = {gathered, at_hand, at_hand, gathered};
  // network 0-2, compute 2-5; the last gather is two ahead of the second, at 3: 3-5, compute 5-6.
  EXPECT_DOUBLE_EQ(run_queues(step, {2, 2, {}}).total, 6);
  EXPECT_DOUBLE_EQ(run_queues(step, {1, 1, {}}).total, 7);
  EXPECT_DOUBLE_EQ(run_queues(step, {1, 1, {}, /*as_engine=*/true}).total, 6);
  // Without prefetch it waits for the end of what is before it: network 5-7, compute 7-8.
  EXPECT_DOUBLE_EQ(run_queues(step, {0, 0, {}, /*as_engine=*/true}).total, 8);
}

TEST(StepQueues, AUnitInUseIsPassedOver) {
  const auto use = [](int unit) {
    return StepOperation{.compute = 3, .gather_rail = 2, .unit = unit};
  };
  // The second use of unit 0 is gathered when its first has ended, at 5, behind that of unit 1:
  // network 0-2 2-4 5-7, compute 2-5 7-10 10-13.
  EXPECT_DOUBLE_EQ(run_queues({use(0), use(0), use(1)}, {2, 2, {}, true}).total, 13);
  // Of no unit: network 0-2 2-4 4-6, compute 2-5 5-8 8-11.
  EXPECT_DOUBLE_EQ(run_queues({use(-1), use(-1), use(-1)}, {2, 2, {}, true}).total, 11);
}

TEST(StepQueues, ReducesBehindTheBackward) {
  // compute 0-1, intra 1-3, network 3-6 (hop 2), network 6-7 (replicate).
  const StepOperation operation{.compute = 1, .reduce_intra = 2, .reduce_rail = 3, .replicate = 1};
  EXPECT_DOUBLE_EQ(run({operation}, 0, 0).total, 7);
  // The second: compute 1-2, intra 3-5, network 7-10 and 10-11.
  EXPECT_DOUBLE_EQ(run({operation, operation}, 0, 0).total, 11);
}

TEST(StepQueues, SlowBusyQueuesDown) {
  // Hop 1 of the second runs 0-4 as compute of the first does not need it.
  const StepOperation first{.compute = 2};
  const StepOperation second{.compute = 0, .gather_rail = 4};
  const Contention compute{.compute_by_network = 0.5};
  const QueueTimes slow = run({first, second}, 1, 1, compute);
  EXPECT_DOUBLE_EQ(slow.compute_ends[0], 3);
  EXPECT_DOUBLE_EQ(slow.total, 4);
  const Contention network{.network_by_compute = 1};
  // 2 s beside compute do 1 s of work; 3 s are left.
  EXPECT_DOUBLE_EQ(run({first, second}, 1, 1, network).total, 5);
}

// --- the step ---

TEST(StepTime, IsComputeWhereNothingIsSent) {
  StepSettings settings = settings_of(1, 1, Variant::kFlat);
  settings.num_microsteps = 6;
  settings.micro_batch = 2;
  const Workload workload = eight_units();
  const StepTime time = step_time(workload, cluster_of(1e9, 1e9), settings);
  EXPECT_NEAR(time.total, 6 * 2 * 8 * 3e-3, 1e-9);
  settings.recompute = true;
  EXPECT_NEAR(step_time(workload, cluster_of(1e9, 1e9), settings).total, 6 * 2 * 8 * 4e-3, 1e-9);
}

TEST(StepTime, IsTheNetworkWhereThatIsSlow) {
  // p = 4 over two nodes, flat: 3/4 * 2 MB at 10 MB/s are 150 ms; per unit twice gathered, once
  // reduced.
  const StepSettings settings = settings_of(4, 4, Variant::kFlat);
  const StepTime time = step_time(eight_units(), cluster_of(1e7, 1e9), settings);
  EXPECT_NEAR(time.gather_rail, 16 * 0.15, 1e-9);
  EXPECT_NEAR(time.reduce_rail, 8 * 0.15, 1e-9);
  EXPECT_EQ(time.gather_intra, 0);
  EXPECT_GE(time.total, 24 * 0.15 - 1e-9);
  EXPECT_LE(time.total, 24 * 0.15 + 5e-3);
}

TEST(StepTime, IsBetweenTheBusiestQueueAndTheSum) {
  const Workload workload = eight_units();
  int cases = 0;
  for (const double inter : {1e8, 1e9, 1e10}) {
    const Cluster cluster = cluster_of(inter, 4e9);
    for (const int p : {1, 2, 4, 8}) {
      for (const Variant variant : {Variant::kFlat, Variant::kHierarchical}) {
        for (const Residency between : kAll) {
          for (const int s : {1, 2, 3, 4, 7}) {
            StepSettings settings = settings_of(8, p, variant);
            settings.residency = {Residency::kShard, between, between};
            settings.num_microsteps = s;
            const double bound = step_time_bound(workload, cluster, settings);
            const double total = step_time(workload, cluster, settings).total;
            settings.overlap = false;
            const double serial = step_time(workload, cluster, settings).total;
            ASSERT_GE(total, bound * (1 - 1e-9)) << "p=" << p << " s=" << s;
            ASSERT_LE(total, serial * (1 + 1e-9)) << "p=" << p << " s=" << s;
            ++cases;
          }
        }
      }
    }
  }
  EXPECT_EQ(cases, 3 * 4 * 2 * 3 * 5);
}

TEST(StepTime, RepeatsTheThirdMicroStep) {
  const Workload workload = eight_units();
  const Cluster cluster = cluster_of(2e8, 1e9);
  StepSettings settings = settings_of(8, 4, Variant::kHierarchical);
  std::vector<double> totals;
  for (int s = 4; s <= 7; ++s) {
    settings.num_microsteps = s;
    totals.push_back(step_time(workload, cluster, settings).total);
  }
  const double increment = totals[1] - totals[0];
  EXPECT_GT(increment, 0);
  EXPECT_NEAR(totals[2] - totals[1], increment, 1e-9);
  EXPECT_NEAR(totals[3] - totals[2], increment, 1e-9);
  // The step from 3 to 4 micro-steps is simulated in full.
  settings.num_microsteps = 3;
  EXPECT_NEAR(totals[0] - step_time(workload, cluster, settings).total, increment, 1e-6);
}

TEST(StepTime, CrossesNodesOnceWhenBlocksAreKept) {
  StepSettings settings = settings_of(4, 4, Variant::kHierarchical);
  settings.num_microsteps = 4;
  const Cluster cluster = cluster_of(1e8, 1e9);
  const StepTime shards = step_time(eight_units(), cluster, settings);
  settings.residency = {Residency::kShard, Residency::kBlock, Residency::kBlock};
  const StepTime blocks = step_time(eight_units(), cluster, settings);
  EXPECT_NEAR(blocks.gather_rail, shards.gather_rail / 8, 1e-9);
  EXPECT_NEAR(blocks.reduce_rail, shards.reduce_rail / 4, 1e-9);
  EXPECT_NEAR(blocks.gather_intra, shards.gather_intra, 1e-9);
  EXPECT_LT(blocks.total, shards.total / 2);
}

TEST(StepTime, CountsReplicasOncePerBoundary) {
  StepSettings settings = settings_of(8, 2, Variant::kFlat);
  settings.num_microsteps = 5;
  const Cluster cluster = cluster_of(1e8, 1e9);
  const StepTime two_hop = step_time(eight_units(), cluster, settings);
  settings.sync = GradientSync::kReplicateEach;
  const StepTime each = step_time(eight_units(), cluster, settings);
  EXPECT_NEAR(each.replicate, 5 * two_hop.replicate, 1e-9);
  EXPECT_GT(each.total, two_hop.total);
  settings.sync = GradientSync::kTwoHop;
  settings.overlap_replicate = false;
  EXPECT_GT(step_time(eight_units(), cluster, settings).total, two_hop.total);
}

TEST(StepTime, ReadsTheTableAndSaysWhenItIsLeft) {
  const StepSettings settings = settings_of(4, 4, Variant::kFlat);
  Cluster cluster = cluster_of(1e8, 1e9);
  const double formula = step_time(eight_units(), cluster, settings).gather_rail;
  cluster.flat = MeasuredTable({{4, 1e6, 0.01}, {4, 2e6, 0.02}});
  const StepTime inside = step_time(eight_units(), cluster, settings);
  EXPECT_FALSE(inside.is_extrapolated);
  EXPECT_NEAR(inside.gather_rail, 16 * 0.02, 1e-9);
  // Beyond it the formula goes on from the table's edge: here twice the formula's time.
  cluster.flat = MeasuredTable({{4, 1e6, 2 * formula / 16 / 2}});
  const StepTime outside = step_time(eight_units(), cluster, settings);
  EXPECT_TRUE(outside.is_extrapolated);
  EXPECT_NEAR(outside.gather_rail, 2 * formula, 1e-9);
}

TEST(StepTime, PricesTheOptimizerByItsBytes) {
  Cluster cluster = cluster_of(1e9, 1e9);
  cluster.memory_bandwidth = 28e6;
  const StepTime time = step_time(eight_units(), cluster, settings_of(2, 2, Variant::kFlat));
  EXPECT_NEAR(time.optimizer, 4, 1e-9);
}

TEST(StepTime, RefusesSettingsThatAreNotLegal) {
  const Workload workload = eight_units();
  const Cluster cluster = cluster_of(1e9, 1e9);
  const auto throws = [&](const StepSettings& settings) {
    EXPECT_THROW((void)step_time(workload, cluster, settings), InvalidArgument);
    EXPECT_THROW((void)step_time_bound(workload, cluster, settings), InvalidArgument);
  };
  throws(settings_of(8, 3, Variant::kFlat));
  StepSettings settings = settings_of(8, 2, Variant::kFlat);
  settings.num_microsteps = 0;
  throws(settings);
  settings = settings_of(8, 2, Variant::kFlat);
  settings.prefetch_intra = 3;
  throws(settings);
}

}  // namespace
}  // namespace mics
