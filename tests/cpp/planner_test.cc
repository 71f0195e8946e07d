#include "mics/model/planner.h"

#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

// A GPT of 1.5e9 parameters on nodes of 4 ranks with 12 GB each.
PlanRequest small_request() {
  PlanRequest request;
  TransformerShape shape;
  shape.hidden = 1600;
  shape.layers = 48;
  shape.heads = 25;
  shape.vocabulary = 50257;
  shape.sequence = 1024;
  request.workload = transformer_workload(shape);
  request.cluster.machine = {4, 1e-3, 0.5e-3, {5e-6, 100e9}, {50e-6, 5e9}};
  request.cluster.peak_flops = 100e12;
  request.cluster.efficiency = 0.5;
  request.cluster.memory_bandwidth = 1e12;
  request.limits.capacity_nbytes = 12e9;
  request.limits.context_nbytes = 1e9;
  request.world_size = 16;
  request.global_batch = 128;
  return request;
}

bool is_same(const StepSettings& a, const StepSettings& b) {
  return a.partition_size == b.partition_size && a.gather == b.gather &&
         a.micro_batch == b.micro_batch && a.recompute == b.recompute &&
         a.prefetch_rail == b.prefetch_rail &&
         a.residency.after_forward == b.residency.after_forward &&
         a.residency.between_microsteps == b.residency.between_microsteps &&
         a.residency.gradient_accumulation == b.residency.gradient_accumulation;
}

// The same over networks from far too slow to faster than compute: the leader and what bounds it
// differ.
class PlannerOnNetwork : public ::testing::TestWithParam<double> {
 protected:
  static PlanRequest request(int num_ranked) {
    PlanRequest request = small_request();
    request.cluster.machine.inter.bandwidth = GetParam();
    request.num_ranked = num_ranked;
    return request;
  }
  static constexpr int kAll = 1 << 20;
};

TEST_P(PlannerOnNetwork, GivesWhatSimulatingEverythingGives) {
  const PlanResult all = plan_step(request(kAll));
  EXPECT_EQ(all.num_simulated, all.num_fitting);
  EXPECT_EQ(all.ranked.size(), static_cast<size_t>(all.num_fitting));
  for (const size_t num_ranked : {1U, 5U, 40U}) {
    const PlanResult few = plan_step(request(static_cast<int>(num_ranked)));
    EXPECT_LT(few.num_simulated, all.num_simulated);
    ASSERT_EQ(few.ranked.size(), num_ranked);
    for (size_t i = 0; i < num_ranked; ++i) {
      EXPECT_EQ(few.ranked[i].time.total, all.ranked[i].time.total);
      EXPECT_TRUE(is_same(few.ranked[i].settings, all.ranked[i].settings)) << i;
    }
    ASSERT_EQ(few.leaders.size(), all.leaders.size());
    for (size_t i = 0; i < few.leaders.size(); ++i) {
      EXPECT_EQ(few.leaders[i].time.total, all.leaders[i].time.total);
    }
  }
}

TEST_P(PlannerOnNetwork, NoStepIsFasterThanItsBound) {
  const PlanRequest all = request(kAll);
  for (const Candidate& candidate : plan_step(all).ranked) {
    EXPECT_LE(step_time_bound(all.workload, all.cluster, candidate.settings),
              candidate.time.total * (1.0 + 1e-12));
  }
}

INSTANTIATE_TEST_SUITE_P(InterBandwidth, PlannerOnNetwork, ::testing::Values(0.2e9, 1e9, 5e9, 50e9),
                         [](const auto& info) { return "case" + std::to_string(info.index); });

TEST(Planner, RanksOnlyWhatFits) {
  const PlanRequest request = small_request();
  const PlanResult result = plan_step(request);
  ASSERT_FALSE(result.ranked.empty());
  for (size_t i = 0; i < result.ranked.size(); ++i) {
    const Candidate& candidate = result.ranked[i];
    EXPECT_TRUE(fits(candidate.memory, request.limits));
    EXPECT_EQ(candidate.settings.micro_batch * candidate.settings.num_microsteps * 16, 128);
    EXPECT_GE(candidate.time.total, result.ranked[i == 0 ? 0 : i - 1].time.total);
  }
  EXPECT_LT(result.num_fitting, result.num_considered);
}

TEST(Planner, NamesTheNearestMissWhereNothingFits) {
  PlanRequest request = small_request();
  request.limits.capacity_nbytes = 2e9;
  const PlanResult result = plan_step(request);
  EXPECT_TRUE(result.ranked.empty());
  ASSERT_EQ(result.misses.size(), 5U);  // p = 1, 2, 4, 8, 16
  for (size_t i = 1; i < result.misses.size(); ++i) {
    EXPECT_LT(result.misses[i].memory.peak, result.misses[i - 1].memory.peak);
  }
  // With what the nearest miss needs, something fits.
  request.limits.capacity_nbytes = result.misses.back().memory.peak / request.limits.usable + 1;
  EXPECT_EQ(plan_step(request).num_fitting > 0, true);
}

TEST(Planner, TakesTheListsItIsGiven) {
  PlanRequest request = small_request();
  request.partition_sizes = {8};
  request.micro_batches = {2};
  request.variants = {Variant::kFlat};
  request.recompute = {true};
  request.vary_residency = request.vary_prefetch = false;
  const PlanResult result = plan_step(request);
  ASSERT_EQ(result.num_considered, 1);
  ASSERT_EQ(result.ranked.size(), 1U);
  EXPECT_EQ(result.ranked[0].settings.partition_size, 8);
  EXPECT_EQ(result.ranked[0].settings.num_microsteps, 4);
  EXPECT_EQ(result.ranked[0].settings.gather, Variant::kFlat);
}

TEST(Planner, PrefersGroupsInsideNodesOnASlowNetwork) {
  PlanRequest request = small_request();
  request.limits.capacity_nbytes = 1e12;
  request.cluster.machine.inter.bandwidth = 1e8;
  request.vary_residency = false;
  EXPECT_LE(plan_step(request).ranked[0].settings.partition_size, 4);
}

TEST(Planner, RefusesWhatCannotBe) {
  PlanRequest request = small_request();
  request.global_batch = 100;
  EXPECT_THROW((void)plan_step(request), InvalidArgument);
  request = small_request();
  request.micro_batches = {3};
  EXPECT_THROW((void)plan_step(request), InvalidArgument);
  request = small_request();
  request.partition_sizes = {6};
  EXPECT_THROW((void)plan_step(request), InvalidArgument);
  request = small_request();
  request.num_ranked = 0;
  EXPECT_THROW((void)plan_step(request), InvalidArgument);
}

}  // namespace
}  // namespace mics
