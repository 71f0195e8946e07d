// Which gathers the runtime starts ahead of use: counted, not timed.
#include "runtime/prefetcher.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "mics/error.h"
#include "runtime/runtime_memory.h"
#include "support/two_nodes.h"

namespace mics {
namespace {

using testing::batch;
using testing::kNumLayers;
using testing::kTwoNodes;
using testing::Model;
using testing::on_two_nodes;
using testing::run_ranks;
using testing::run_step;
using testing::World;

TEST(Prefetcher, FirstForwardGathersOnDemand) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.engine().pre_forward(0);
    ASSERT_EQ(model.gather().intra().calls, 1);
    ASSERT_EQ(model.gather().rail().calls, 1);
  });
}

TEST(Prefetcher, SecondForwardStartsHop2OfOneUnitAndHop1OfTwoAhead) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.forward_nested(batch(rank, 0)).sum().backward();
    const int64_t intra = model.gather().intra().calls;
    const int64_t rail = model.gather().rail().calls;
    model.engine().pre_forward(0);
    ASSERT_EQ(model.gather().intra().calls - intra, 2);
    ASSERT_EQ(model.gather().rail().calls - rail, 3);
    ASSERT_FALSE(model.unit(1).parameters().is_unsharded());
  });
}

TEST(Prefetcher, SecondBackwardStartsGathersAhead) {
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
    model.unit(layer).settings().synchronize_gradients = is_boundary;
  }
}

TEST(Prefetcher, BackwardStartsTheNextMicroStepButNothingPastABoundary) {
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

TEST(Prefetcher, NothingIsStartedPastAForwardThatDoesNotRecord) {
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

TEST(Prefetcher, PhaseThatDoesNotComeCostsItsFirstGatherAndChangesNoBit) {
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

TEST(Prefetcher, ExplicitListReplacesTheRecordedOrder) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    model.engine().set_prefetch(Phase::kForward, 0, {2, 1});
    model.engine().pre_forward(0);
    ASSERT_EQ(model.gather().intra().calls, 3);
    model.engine().pre_forward(1);
    model.engine().pre_forward(2);
    ASSERT_EQ(model.gather().intra().calls, 3);
  });
}

TEST(Prefetcher, SteadyStepsGatherEachUnitTwiceAndChangeNoOrder) {
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

TEST(Prefetcher, AnotherOrderIsCountedAndGivesTheSameBits) {
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
    ASSERT_TRUE(unfinished_units(model.engine().units()).empty());
  });
}

TEST(Prefetcher, UnitUsedTwiceInARowIsGatheredOnce) {
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

TEST(Prefetcher, DepthsMayChangeBetweenSteps) {
  on_two_nodes([](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank);
    run_step(model, rank);
    const at::Tensor gradient = model.sharded(0).grad().clone();
    model.sharded(0).mutable_grad().reset();
    model.engine().unshard(1);
    ASSERT_THROW(model.engine().set_depths({0, 0, 1}), InvalidArgument);  // a unit is in use
    model.engine().reshard(1);
    ASSERT_THROW(model.engine().set_depths({2, 1, 1}), InvalidArgument);
    model.engine().set_depths({0, 0, 1});
    run_step(model, rank);
    ASSERT_TRUE(at::equal(model.sharded(0).grad(), gradient));
    for (const int depth : {0, 1, 2}) {
      model.engine().set_depths({depth, depth, 2});
      const int64_t gathers = model.gather().intra().calls;
      model.engine().pre_forward(0);
      ASSERT_EQ(model.gather().intra().calls - gathers, 1 + depth);
      model.engine().reset();
      run_step(model, rank);  // records the order again
    }
  });
}

}  // namespace
}  // namespace mics
