// What the runtime keeps between uses and plans to hold: counted, not timed.
#include "runtime/runtime_memory.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include "mics/error.h"
#include "mics/model/cost_model.h"
#include "support/counting.h"
#include "support/two_nodes.h"

namespace mics {
namespace {

using testing::batch;
using testing::gradients_of;
using testing::gradients_under;
using testing::kMicroSteps;
using testing::kNumLayers;
using testing::kTwoNodes;
using testing::Model;
using testing::on_two_nodes;
using testing::run_ranks;
using testing::run_step;

struct ResidencyCase {
  std::string name;
  ResidencySettings settings;
};

class ResidencyOf : public ::testing::TestWithParam<ResidencyCase> {};

TEST_P(ResidencyOf, HopsOfAStepAreThoseOfTheCostModel) {
  const ResidencySettings& residency = GetParam().settings;
  const HopCounts counts = count_hops(residency, kMicroSteps, /*replication_size=*/1);
  on_two_nodes([&](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank, residency);
    run_step(model, rank);
    ASSERT_EQ(model.gather().rail().calls, counts.gather_rail * kNumLayers);
    ASSERT_EQ(model.gather().intra().calls, counts.gather_intra * kNumLayers);
    ASSERT_EQ(model.reduce().intra().calls, counts.reduce_intra * kNumLayers);
    ASSERT_EQ(model.reduce().rail().calls, counts.reduce_rail * kNumLayers);
    ASSERT_EQ(model.engine().memory().num_grown(), 0);
  });
}

// Sums over micro-steps come before those over nodes in a gradient block, so only without one are
// the bits equal.
TEST_P(ResidencyOf, GradientsEqualThoseWithoutResidency) {
  const auto expected = gradients_under(ResidencySettings());
  const auto got = gradients_under(GetParam().settings);
  const bool is_exact = GetParam().settings.gradient_accumulation == Residency::kShard;
  for (size_t rank = 0; rank < got.size(); ++rank) {
    for (size_t layer = 0; layer < got[rank].size(); ++layer) {
      if (is_exact) {
        ASSERT_TRUE(at::equal(got[rank][layer], expected[rank][layer]));
      } else {
        ASSERT_TRUE(at::allclose(got[rank][layer], expected[rank][layer], 1e-5, 1e-6));
      }
    }
  }
}

TEST_P(ResidencyOf, WrittenShardIsGatheredAnew) {
  on_two_nodes([&](LocalWorld& world, int rank) {
    const c10::NoGradGuard no_grad;
    Model model(world, kTwoNodes, rank, GetParam().settings);
    (void)model.forward_nested(batch(rank, 0));
    for (int layer = 0; layer < kNumLayers; ++layer) {
      at::Tensor weight = model.sharded(layer);
      weight.mul_(0.5);
    }
    at::Tensor expected = batch(rank, 0);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      expected = expected.mm(testing::initial_weight(layer) * 0.5).tanh();
    }
    expected = expected * 2.0;
    ASSERT_TRUE(at::equal(model.forward_nested(batch(rank, 0)), expected));
  });
}

constexpr Residency kShard = Residency::kShard;
constexpr Residency kBlock = Residency::kBlock;
constexpr Residency kFull = Residency::kFull;

INSTANTIATE_TEST_SUITE_P(
    TwoNodes, ResidencyOf,
    ::testing::Values(ResidencyCase{"shard", {kShard, kShard, kShard}},
                      ResidencyCase{"block_until_backward", {kBlock, kShard, kShard}},
                      ResidencyCase{"block", {kBlock, kBlock, kShard}},
                      ResidencyCase{"block_with_gradients", {kBlock, kBlock, kBlock}},
                      ResidencyCase{"gradients", {kShard, kShard, kBlock}},
                      ResidencyCase{"full_until_backward", {kFull, kShard, kShard}},
                      ResidencyCase{"full", {kFull, kFull, kBlock}}),
    [](const auto& info) { return info.param.name; });

TEST(RuntimeMemory, PartsAddUpAndHoldWhatResidencyAsksFor) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank, {kBlock, kBlock, kBlock});
    const RuntimeMemory& memory = model.engine().memory();
    int64_t total = 0;
    std::vector<std::string> names;
    for (const MemoryPart& part : memory.parts()) {
      total += part.nbytes;
      names.push_back(part.name);
    }
    ASSERT_EQ(total, memory.nbytes());
    const std::vector<std::string> expected = {"full, kept", "blocks, kept", "gradient blocks",
                                               "full slots", "reductions",   "packed gradients",
                                               "flags"};
    ASSERT_EQ(names, expected);
  });
}

TEST(RuntimeMemory, PlannedInInferenceModeServesTrainingToo) {
  const ResidencySettings residency = {kBlock, kBlock, kBlock};
  const std::vector<std::vector<at::Tensor>> expected = gradients_under(residency);
  on_two_nodes([&](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank, residency);
    {
      const c10::InferenceMode inference;
      (void)model.engine().memory();
    }
    run_step(model, rank);
    const std::vector<at::Tensor> found = gradients_of(model);
    for (size_t layer = 0; layer < found.size(); ++layer) {
      ASSERT_TRUE(at::equal(found[layer], expected[static_cast<size_t>(rank)][layer]));
    }
  });
}

TEST(RuntimeMemory, IsPlannedAnewWhenSettingsChange) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.forward_nested(batch(rank, 0)).sum().backward();
    for (int layer = 0; layer < kNumLayers; ++layer) {
      model.unit(layer).settings().residency = {kFull, kFull, kShard};
    }
    model.forward_nested(batch(rank, 1)).sum().backward();
    ASSERT_EQ(model.engine().memory().parts().front().name, "full, kept");
    ASSERT_EQ(model.engine().memory().num_grown(), 0);
  });
}

TEST(RuntimeMemory, UnitsUnshardedByHandAreCountedAsGrowth) {
  on_two_nodes([](LocalWorld& world, int rank) {
    // One slot, and the root's own.
    Model model(world, kTwoNodes, rank, {}, {0, 0, 2});
    for (int layer = 0; layer < kNumLayers; ++layer) model.engine().unshard(layer);
    ASSERT_EQ(model.engine().memory().num_grown(), kNumLayers - 2);
    for (int layer = 0; layer < kNumLayers; ++layer) model.engine().reshard(layer);
  });
}

TEST(RuntimeMemory, BesideThePlanIsFreedWhenGivenBack) {
  const testing::CountingAllocator allocator;
  LocalWorld world(kTwoNodes.size(), std::chrono::seconds(60));
  std::vector<std::unique_ptr<Model>> models(static_cast<size_t>(kTwoNodes.size()));
  const auto unshard_all = [&](int rank, int num_units) {
    Engine& engine = models[static_cast<size_t>(rank)]->engine();
    for (int layer = 0; layer < num_units; ++layer) engine.unshard(layer);
    for (int layer = 0; layer < num_units; ++layer) engine.reshard(layer);
  };
  run_ranks(kTwoNodes.size(), [&](int rank) {
    models[static_cast<size_t>(rank)] =
        std::make_unique<Model>(world, kTwoNodes, rank, ResidencySettings(), Depths{0, 0, 2});
    unshard_all(rank, 1);
  });
  const int64_t planned = allocator.live_nbytes();
  run_ranks(kTwoNodes.size(), [&](int rank) { unshard_all(rank, kNumLayers); });
  ASSERT_EQ(models.front()->engine().memory().num_grown(), kNumLayers - 2);
  ASSERT_EQ(allocator.live_nbytes(), planned);
}

TEST(RuntimeMemory, IsReleasedBetweenStepsOnly) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.engine().unshard(0);
    ASSERT_THROW(model.engine().release_memory(), InvalidArgument);
    model.engine().reshard(0);
    model.engine().release_memory();
    model.forward_nested(batch(rank, 0)).sum().backward();
    const at::Tensor gradient = model.sharded(0).grad().clone();
    model.engine().release_memory();
    ASSERT_TRUE(at::equal(model.sharded(0).grad(), gradient));
  });
}

}  // namespace
}  // namespace mics
