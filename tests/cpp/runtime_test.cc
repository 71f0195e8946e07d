// What the runtime does ahead of use, keeps between uses and plans to hold: counted, not timed.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <array>

#include "mics/engine.h"
#include "mics/error.h"
#include "support/chain_model.h"
#include "support/counting.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::batch;
using testing::kNumLayers;
using testing::Model;
using testing::run_ranks;
using testing::World;

// One partition group of two nodes.
constexpr World kTwoNodes = {2, 2, 4, true};
constexpr int kMicroSteps = 4;

void on_two_nodes(const std::function<void(LocalWorld&, int)>& body) {
  LocalWorld world(kTwoNodes.size(), std::chrono::seconds(60));
  run_ranks(kTwoNodes.size(), [&](int rank) { body(world, rank); });
}

void run_step(Model& model, int rank) {
  for (int step = 0; step < kMicroSteps; ++step) {
    for (int layer = 0; layer < kNumLayers; ++layer) {
      model.engine().unit(layer).settings().synchronize_gradients = step == kMicroSteps - 1;
    }
    model.forward_nested(batch(rank, step)).sum().backward();
  }
}

std::vector<at::Tensor> gradients_of(Model& model) {
  std::vector<at::Tensor> gradients;
  for (int layer = 0; layer < kNumLayers; ++layer) {
    gradients.push_back(model.sharded(layer).grad().clone());
  }
  return gradients;
}

// Two models of one world must not use a communicator of the same name at a time: one after the
// other.
std::vector<std::vector<at::Tensor>> gradients_under(const ResidencySettings& residency) {
  std::vector<std::vector<at::Tensor>> gradients(static_cast<size_t>(kTwoNodes.size()));
  on_two_nodes([&](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank, residency);
    run_step(model, rank);
    gradients[static_cast<size_t>(rank)] = gradients_of(model);
  });
  return gradients;
}

TEST(Prefetch, FirstForwardGathersOnDemand) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.engine().pre_forward(0);
    ASSERT_EQ(model.gather().intra().calls, 1);
    ASSERT_EQ(model.gather().rail().calls, 1);
  });
}

TEST(Prefetch, SecondForwardStartsHop2OfOneUnitAndHop1OfTwoAhead) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.forward_nested(batch(rank, 0)).sum().backward();
    const int64_t intra = model.gather().intra().calls;
    const int64_t rail = model.gather().rail().calls;
    model.engine().pre_forward(0);
    ASSERT_EQ(model.gather().intra().calls - intra, 2);
    ASSERT_EQ(model.gather().rail().calls - rail, 3);
    ASSERT_FALSE(model.engine().unit(1).is_unsharded());
  });
}

TEST(Prefetch, SecondBackwardStartsGathersAhead) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.forward_nested(batch(rank, 0)).sum().backward();
    const int64_t intra = model.gather().intra().calls;
    const at::Tensor out = model.forward_nested(batch(rank, 1));
    // The root's, which backward needs first, is started when forward lets go of it.
    ASSERT_EQ(model.gather().intra().calls - intra, kNumLayers + 1);
    int64_t at_first_gradient = 0;
    // Called after the hook of the engine, which was registered first.
    out.register_hook([&](const at::Tensor&) { at_first_gradient = model.gather().intra().calls; });
    out.sum().backward();
    ASSERT_EQ(at_first_gradient - intra, kNumLayers + 2);
    ASSERT_EQ(model.gather().intra().calls - intra, 2 * kNumLayers);
  });
}

void set_boundary(Model& model, bool is_boundary) {
  for (int layer = 0; layer < kNumLayers; ++layer) {
    model.engine().unit(layer).settings().synchronize_gradients = is_boundary;
  }
}

TEST(Prefetch, BackwardStartsTheNextMicroStepButNothingPastABoundary) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    const auto rail_calls = [&] { return model.gather().rail().calls; };
    set_boundary(model, false);
    for (int step = 0; step < 2; ++step) model.forward_nested(batch(rank, step)).sum().backward();
    // The root and, one hop further, the layer after it.
    ASSERT_EQ(rail_calls(), 4 * kNumLayers + 2);
    set_boundary(model, true);
    model.forward_nested(batch(rank, 2)).sum().backward();
    ASSERT_EQ(rail_calls(), 6 * kNumLayers);
    ASSERT_EQ(model.engine().num_order_changes(), 0);
    ASSERT_EQ(model.engine().memory().num_grown(), 0);
  });
}

TEST(Prefetch, NothingIsStartedPastAForwardThatDoesNotRecord) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.forward_nested(batch(rank, 0)).sum().backward();
    const c10::NoGradGuard no_grad;
    for (int step = 1; step <= 3; ++step) {
      (void)model.forward_nested(batch(rank, 0));
      ASSERT_EQ(model.gather().rail().calls, (2 + step) * kNumLayers);
    }
  });
}

TEST(Prefetch, PhaseThatDoesNotComeCostsItsFirstGatherAndChangesNoBit) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    const at::Tensor expected = model.forward_nested(batch(rank, 0)).detach();
    for (int step = 0; step < 2; ++step) model.forward_nested(batch(rank, step)).sum().backward();
    const int64_t before = model.gather().intra().calls;
    // Two forwards, where a backward came the last time.
    ASSERT_TRUE(at::equal(model.forward_nested(batch(rank, 0)), expected));
    ASSERT_TRUE(at::equal(model.forward_nested(batch(rank, 0)), expected));
    // One was dropped with the first guess; then another forward is expected, which gathers for
    // itself.
    ASSERT_EQ(model.gather().intra().calls - before, 2 * kNumLayers + 1);
    ASSERT_TRUE(at::equal(model.forward_nested(batch(rank, 0)), expected));
    ASSERT_EQ(model.gather().intra().calls - before, 3 * kNumLayers + 1);
    ASSERT_EQ(model.engine().memory().num_grown(), 0);
  });
}

TEST(Prefetch, ExplicitListReplacesTheRecordedOrder) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.engine().set_forward_prefetch(0, {2, 1});
    model.engine().pre_forward(0);
    ASSERT_EQ(model.gather().intra().calls, 3);
    model.engine().pre_forward(1);
    model.engine().pre_forward(2);
    ASSERT_EQ(model.gather().intra().calls, 3);
  });
}

TEST(Prefetch, SteadyStepsGatherEachUnitTwiceAndChangeNoOrder) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    for (int step = 1; step <= 3; ++step) {
      model.forward_nested(batch(rank, step)).sum().backward();
      ASSERT_EQ(model.gather().intra().calls, 2 * kNumLayers * step);
      ASSERT_EQ(model.gather().rail().calls, 2 * kNumLayers * step);
    }
    ASSERT_EQ(model.engine().num_order_changes(), 0);
    ASSERT_EQ(model.engine().memory().num_grown(), 0);
  });
}

TEST(Prefetch, AnotherOrderIsCountedAndGivesTheSameBits) {
  const std::vector<int> other_order = {2, 1};
  std::vector<at::Tensor> expected(static_cast<size_t>(kTwoNodes.size()));
  on_two_nodes([&](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    expected[static_cast<size_t>(rank)] = model.forward_nested(batch(rank, 0), other_order);
  });
  on_two_nodes([&](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    for (int step = 0; step < 2; ++step) model.forward_nested(batch(rank, step)).sum().backward();
    const at::Tensor out = model.forward_nested(batch(rank, 0), other_order);
    ASSERT_TRUE(at::equal(out, expected[static_cast<size_t>(rank)]));
    ASSERT_EQ(model.engine().num_order_changes(), 1);
    out.sum().backward();
    ASSERT_TRUE(model.engine().unfinished_units().empty());
  });
}

TEST(Prefetch, UnitUsedTwiceInARowIsGatheredOnce) {
  on_two_nodes([](LocalWorld& world, int rank) {
    const c10::NoGradGuard no_grad;
    Model model(world, kTwoNodes, rank);
    (void)model.forward_nested(batch(rank, 0), {1, 1, 2});
    const int64_t before = model.gather().intra().calls;
    (void)model.forward_nested(batch(rank, 0), {1, 1, 2});
    ASSERT_EQ(model.gather().intra().calls - before, 3);
  });
}

// What the ranks' step ends with when rank 1 runs its layers in another order.
std::string message_of_step(Model& model, int rank, const std::vector<int>& order) {
  try {
    model.forward_nested(batch(rank, 0), order).sum().backward();
  } catch (const std::exception& error) {
    return error.what();
  }
  return {};
}

TEST(Digest, AnotherOrderOnOneRankIsFoundByAllAtTheBoundary) {
  constexpr World kOneNode = {1, 3, 3, true};
  LocalWorld world(kOneNode.size(), std::chrono::seconds(60));
  run_ranks(kOneNode.size(), [&](int rank) {
    Model model(world, kOneNode, rank);
    const at::Tensor weight = model.sharded(1).clone();
    // As many collectives, of the same sizes: nothing hangs.
    const std::string message =
        message_of_step(model, rank, rank == 1 ? std::vector<int>{2, 1} : std::vector<int>{1, 2});
    const std::string expected =
        "all ranks must run the units in the same order: collective 2 since the last boundary is "
        "hop 2 of the gather of \"layer1\" on world_ranks [0 2], hop 2 of the gather of "
        "\"layer2\" on world_ranks [1].";
    ASSERT_EQ(message.substr(0, expected.size()), expected);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      ASSERT_FALSE(model.sharded(layer).grad().defined());
    }
    ASSERT_TRUE(at::equal(model.sharded(1), weight));
    model.engine().reset();
    ASSERT_EQ(message_of_step(model, rank, {1, 2}), "");
    const at::Tensor gradient = model.sharded(1).grad().clone();
    model.engine().reset();
    for (int layer = 0; layer < kNumLayers; ++layer) model.sharded(layer).mutable_grad().reset();
    ASSERT_EQ(message_of_step(model, rank, {1, 2}), "");
    ASSERT_TRUE(at::equal(model.sharded(1).grad(), gradient));
  });
}

TEST(Digest, SumsTellWhetherAllAreEqual) {
  StepDigest first, second;
  first.note(StepDigest::Launch::kReduce, 1);
  second.note(StepDigest::Launch::kReduce, 2);
  const auto sums = [](const std::vector<const StepDigest*>& ranks) {
    std::array<int64_t, StepDigest::kNumWords> sum = {}, own = {};
    for (const StepDigest* rank : ranks) {
      rank->write(own.data());
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += own[i];
    }
    return sum;
  };
  for (int num_ranks = 2; num_ranks <= 5; ++num_ranks) {
    std::vector<const StepDigest*> ranks(static_cast<size_t>(num_ranks), &first);
    EXPECT_TRUE(StepDigest::are_equal(sums(ranks).data(), num_ranks));
    ranks.back() = &second;
    EXPECT_FALSE(StepDigest::are_equal(sums(ranks).data(), num_ranks));
  }
}

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

TEST(Memory, PartsAddUpAndHoldWhatResidencyAsksFor) {
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

TEST(Memory, PlannedInInferenceModeServesTrainingToo) {
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

TEST(Memory, IsPlannedAnewWhenSettingsChange) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.forward_nested(batch(rank, 0)).sum().backward();
    for (int layer = 0; layer < kNumLayers; ++layer) {
      model.engine().unit(layer).settings().residency = {kFull, kFull, kShard};
    }
    model.forward_nested(batch(rank, 1)).sum().backward();
    ASSERT_EQ(model.engine().memory().parts().front().name, "full, kept");
    ASSERT_EQ(model.engine().memory().num_grown(), 0);
  });
}

TEST(Memory, UnitsUnshardedByHandAreCountedAsGrowth) {
  on_two_nodes([](LocalWorld& world, int rank) {
    // One slot, and the root's own.
    Model model(world, kTwoNodes, rank, {}, {0, 0, 2});
    for (int layer = 0; layer < kNumLayers; ++layer) model.engine().unshard(layer);
    ASSERT_EQ(model.engine().memory().num_grown(), kNumLayers - 2);
    for (int layer = 0; layer < kNumLayers; ++layer) model.engine().reshard(layer);
  });
}

TEST(Memory, BesideThePlanIsFreedWhenGivenBack) {
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

TEST(Memory, IsReleasedBetweenStepsOnly) {
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
