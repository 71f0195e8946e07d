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
        model.engine().unit(layer).settings().synchronize_gradients = is_last;
      }
      model.forward(batch(rank, step)).sum().backward();
      ASSERT_EQ(model.engine().unfinished_units().empty(), is_last);
      ASSERT_EQ(model.sharded(0).grad().defined(), is_last);
    }
    const ShardLayout::RowRange rows = model.rows(shape.partition_size);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      expect_close(model.sharded(layer).grad(), expected[static_cast<size_t>(layer)], rows);
      ASSERT_FALSE(model.engine().unit(layer).is_unsharded());
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
    model.engine().unit(layer).settings().synchronize_gradients = false;
  }
  model.forward(batch(0, 5)).sum().backward();
  EXPECT_EQ(model.engine().unfinished_units().size(), static_cast<size_t>(kNumLayers));
  model.engine().reset();
  EXPECT_TRUE(model.engine().unfinished_units().empty());
  for (int layer = 0; layer < kNumLayers; ++layer) {
    model.engine().unit(layer).settings().synchronize_gradients = true;
  }
  model.forward(batch(0, 0)).sum().backward();
  expect_close(model.sharded(0).grad(), reference_gradients(1, 1)[0], model.rows(1));
}

}  // namespace
}  // namespace mics
