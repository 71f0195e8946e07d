// Engine and unit without Python: a chain of linear layers on ranks that are threads.
#include "mics/engine.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include "mics/error.h"
#include "mics/topology.h"
#include "support/chain_model.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::batch;
using testing::initial_weight;
using testing::kNumLayers;
using testing::kWidth;
using testing::Model;
using testing::run_ranks;
using testing::World;

// The gradient of one process over all ranks' batches.
std::vector<at::Tensor> reference_gradients(int world_size, int num_micro_steps) {
  std::vector<at::Tensor> weights;
  for (int layer = 0; layer < kNumLayers; ++layer) {
    weights.push_back(initial_weight(layer));
    weights.back().requires_grad_(true);
  }
  for (int step = 0; step < num_micro_steps; ++step) {
    for (int rank = 0; rank < world_size; ++rank) {
      at::Tensor x = batch(rank, step);
      for (const at::Tensor& weight : weights) x = x.mm(weight).tanh();
      (x.sum() / world_size).backward();
    }
  }
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& weight : weights) gradients.push_back(weight.grad());
  return gradients;
}

// Rows of a gradient against one process: the error relative to the whole tensor.
void expect_close(const at::Tensor& got, const at::Tensor& expected, ShardLayout::RowRange rows) {
  ASSERT_TRUE(got.defined());
  const at::Tensor error = got - expected.slice(0, rows.first, rows.last);
  ASSERT_LE(error.norm().item<float>(), 5e-7F * expected.norm().item<float>());
}

// Every legal (n, L, p) with n <= 8, flat and, where a partition group spans nodes, hierarchical.
std::vector<World> all_worlds() {
  std::vector<World> worlds;
  for (int n = 1; n <= 8; ++n) {
    for (int ranks_per_node = 1; ranks_per_node <= n; ++ranks_per_node) {
      if (n % ranks_per_node != 0) continue;
      for (const int p : Topology::legal_partition_sizes(n, ranks_per_node)) {
        worlds.push_back({n / ranks_per_node, ranks_per_node, p, false});
        if (p > ranks_per_node) worlds.push_back({n / ranks_per_node, ranks_per_node, p, true});
      }
    }
  }
  return worlds;
}

class EngineOnWorld : public ::testing::TestWithParam<World> {};

void expect_gradients_equal_one_process(const World& shape, int num_micro_steps) {
  const std::vector<at::Tensor> expected = reference_gradients(shape.size(), num_micro_steps);
  LocalWorld world(shape.size(), std::chrono::seconds(60));
  run_ranks(shape.size(), [&](int rank) {
    Model model(world, shape, rank);
    for (int step = 0; step < num_micro_steps; ++step) {
      const bool is_last = step == num_micro_steps - 1;
      for (int layer = 0; layer < kNumLayers; ++layer) {
        model.unit(layer).settings().synchronize_gradients = is_last;
      }
      model.forward(batch(rank, step)).sum().backward();
      ASSERT_EQ(unfinished_units(model.engine().units()).empty(), is_last);
      ASSERT_EQ(model.sharded(0).grad().defined(), is_last);
    }
    const ShardLayout::RowRange rows = model.rows(shape.partition_size);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      expect_close(model.sharded(layer).grad(), expected[static_cast<size_t>(layer)], rows);
      ASSERT_FALSE(model.unit(layer).parameters().is_unsharded());
    }
  });
}

TEST_P(EngineOnWorld, GradientsOfOneMicroStepEqualOneProcess) {
  expect_gradients_equal_one_process(GetParam(), 1);
}

TEST_P(EngineOnWorld, GradientsOfThreeMicroStepsEqualOneProcess) {
  expect_gradients_equal_one_process(GetParam(), 3);
}

TEST_P(EngineOnWorld, ASecondBoundaryAddsToAVisibleGradient) {
  const World shape = GetParam();
  LocalWorld world(shape.size(), std::chrono::seconds(60));
  const std::vector<at::Tensor> expected = reference_gradients(shape.size(), 2);
  run_ranks(shape.size(), [&](int rank) {
    Model model(world, shape, rank);
    for (int step = 0; step < 2; ++step) model.forward(batch(rank, step)).sum().backward();
    const ShardLayout::RowRange rows = model.rows(shape.partition_size);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      expect_close(model.sharded(layer).grad(), expected[static_cast<size_t>(layer)], rows);
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Local, EngineOnWorld, ::testing::ValuesIn(all_worlds()),
                         [](const auto& info) {
                           return std::to_string(info.param.num_nodes) + "x" +
                                  std::to_string(info.param.ranks_per_node) + "_p" +
                                  std::to_string(info.param.partition_size) +
                                  (info.param.hierarchical ? "_hierarchical" : "_flat");
                         });

TEST(Engine, UseOfAWeightChangedBetweenForwardAndBackwardIsRefused) {
  LocalWorld world(1, std::chrono::seconds(60));
  Model model(world, {1, 1, 1, false}, 0);
  const at::Tensor loss = model.forward(batch(0, 0)).sum();
  {
    const c10::NoGradGuard no_grad;
    at::Tensor weight = model.sharded(1);
    weight.add_(1.0);
  }
  EXPECT_THROW(loss.backward(), std::exception);
}

TEST(Engine, RunsOnAfterAnExceptionInBackward) {
  LocalWorld world(1, std::chrono::seconds(60));
  Model model(world, {1, 1, 1, false}, 0);
  at::Tensor out = model.forward(batch(0, 0));
  out.register_hook([](const at::Tensor&) { throw std::runtime_error("injected"); });
  EXPECT_THROW(out.sum().backward(), std::exception);
  out = at::Tensor();
  model.forward(batch(0, 0)).sum().backward();
  expect_close(model.sharded(0).grad(), reference_gradients(1, 1)[0], model.rows(1));
}

TEST(Engine, FailedBackwardLeavesAVisibleGradientAsItWas) {
  LocalWorld world(1, std::chrono::seconds(60));
  Model model(world, {1, 1, 1, false}, 0);
  model.forward(batch(0, 0)).sum().backward();
  const at::Tensor before = model.sharded(2).grad().clone();
  at::Tensor x = batch(0, 1);
  x.requires_grad_(true);
  x.register_hook([](const at::Tensor&) { throw std::runtime_error("injected"); });
  EXPECT_THROW(model.forward(x).sum().backward(), std::exception);
  model.engine().reset();
  EXPECT_TRUE(at::equal(model.sharded(2).grad(), before));
  model.forward(batch(0, 1)).sum().backward();
  expect_close(model.sharded(2).grad(), reference_gradients(1, 2)[2], model.rows(1));
}

TEST(Engine, ResetDropsAnUnfinishedAccumulation) {
  LocalWorld world(1, std::chrono::seconds(60));
  Model model(world, {1, 1, 1, false}, 0);
  for (int layer = 0; layer < kNumLayers; ++layer) {
    model.unit(layer).settings().synchronize_gradients = false;
  }
  model.forward(batch(0, 5)).sum().backward();
  EXPECT_EQ(unfinished_units(model.engine().units()).size(), static_cast<size_t>(kNumLayers));
  model.engine().reset();
  EXPECT_TRUE(unfinished_units(model.engine().units()).empty());
  for (int layer = 0; layer < kNumLayers; ++layer) {
    model.unit(layer).settings().synchronize_gradients = true;
  }
  model.forward(batch(0, 0)).sum().backward();
  expect_close(model.sharded(0).grad(), reference_gradients(1, 1)[0], model.rows(1));
}

// Layer 0 is the outermost; layer 1 is read by it and never called.
at::Tensor forward_with_lent(Model& model, const at::Tensor& x) {
  return model.forward_nested_lending(x, /*inner=*/{2}, /*lent=*/1);
}

TEST(Engine, LentUnitTrainsAsOneProcess) {
  for (const World& shape :
       std::vector<World>{{2, 2, 4, true}, {2, 2, 2, false}, {1, 1, 1, false}}) {
    std::vector<at::Tensor> weights;
    for (int layer = 0; layer < kNumLayers; ++layer) {
      weights.push_back(initial_weight(layer));
      weights.back().requires_grad_(true);
    }
    for (int step = 0; step < 2; ++step) {
      for (int rank = 0; rank < shape.size(); ++rank) {
        at::Tensor y = batch(rank, step).mm(weights[0]).tanh();
        y = y.mm(weights[1]);
        y = y.mm(weights[2]).tanh();
        y = y.mm(weights[1]) * 2.0;
        (y.sum() / shape.size()).backward();
      }
    }
    LocalWorld world(shape.size(), std::chrono::seconds(60));
    run_ranks(shape.size(), [&](int rank) {
      Model model(world, shape, rank);
      for (int step = 0; step < 2; ++step) {
        for (int layer = 0; layer < kNumLayers; ++layer) {
          model.unit(layer).settings().synchronize_gradients = step == 1;
        }
        forward_with_lent(model, batch(rank, step)).sum().backward();
        ASSERT_TRUE(model.unit(1).is_lent());
        ASSERT_FALSE(model.unit(1).parameters().is_unsharded());
      }
      for (int layer = 0; layer < kNumLayers; ++layer) {
        const at::Tensor& expected = weights[static_cast<size_t>(layer)].grad();
        const ShardLayout::RowRange rows = model.rows(shape.partition_size);
        ASSERT_LE((model.sharded(layer).grad() - expected.slice(0, rows.first, rows.last))
                      .norm()
                      .item<float>(),
                  2e-6F * expected.norm().item<float>());
      }
    });
  }
}

TEST(Engine, LendsNothingOutsideOfAForward) {
  LocalWorld world(1, std::chrono::seconds(60));
  Model model(world, {1, 1, 1, false}, 0);
  model.engine().lend(1, /*is_group=*/false);
  EXPECT_FALSE(model.unit(1).is_lent());
  EXPECT_FALSE(model.engine().is_in_forward());
}

TEST(Engine, BackwardMayRunInsideAForward) {
  LocalWorld world(1, std::chrono::seconds(60));
  Model model(world, {1, 1, 1, false}, 0);
  model.forward_nested(batch(0, 0), {1, 2}, [&](const at::Tensor& y) {
    y.sum().backward();
    EXPECT_TRUE(model.unit(0).parameters().is_unsharded());  // its forward goes on
    EXPECT_TRUE(unfinished_units(model.engine().units()).empty());
  });
  at::Tensor x = batch(0, 0);
  std::vector<at::Tensor> weights;
  for (int layer = 0; layer < kNumLayers; ++layer) {
    weights.push_back(initial_weight(layer));
    weights.back().requires_grad_(true);
    x = x.mm(weights.back()).tanh();
  }
  x.sum().backward();
  for (int layer = 0; layer < kNumLayers; ++layer) {
    expect_close(model.sharded(layer).grad(), weights[static_cast<size_t>(layer)].grad(),
                 model.rows(1));
  }
}

TEST(Engine, EveryForwardOutsideOfAnAccumulationGathersAnew) {
  const World shape = {1, 2, 2, false};
  LocalWorld world(shape.size(), std::chrono::seconds(60));
  run_ranks(shape.size(), [&](int rank) {
    ResidencySettings residency;
    residency.after_forward = residency.between_microsteps = Residency::kFull;
    Model model(world, shape, rank, residency);
    const auto gathers = [&] { return model.gather().intra().calls; };
    const auto forward = [&](bool is_boundary) {
      for (int layer = 0; layer < kNumLayers; ++layer) {
        model.unit(layer).settings().synchronize_gradients = is_boundary;
      }
      const int64_t before = gathers();
      model.forward(batch(rank, 0)).sum().backward();
      return gathers() - before;
    };
    // Each layer is an outermost forward of its own here: kept for its backward, gathered anew.
    ASSERT_EQ(forward(false), kNumLayers);
    ASSERT_EQ(forward(false), 0);  // the accumulation is open
    ASSERT_EQ(forward(true), 0);
    ASSERT_EQ(forward(true), kNumLayers);  // after a boundary
    model.engine().note_written({1});
    ASSERT_EQ(forward(false), kNumLayers);
    model.engine().note_written({1});  // a step in the middle: of one unit
    ASSERT_EQ(forward(false), 1);
  });
}

}  // namespace
}  // namespace mics
