// Engine and unit without Python: a chain of linear layers on ranks that are threads.
#include "mics/engine.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/variable.h>

#include "mics/error.h"
#include "mics/topology.h"
#include "support/local_hops.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::LocalHops;
using testing::run_ranks;

constexpr int kWidth = 5;
constexpr int kNumLayers = 3;

struct World {
  int num_nodes;
  int ranks_per_node;
  int partition_size;
  bool hierarchical;
  [[nodiscard]] int size() const { return num_nodes * ranks_per_node; }
};

at::Tensor initial_weight(int layer) {
  return (at::arange(kWidth * kWidth, at::kFloat).view({kWidth, kWidth}) + layer).remainder(3.0) -
         1.0;
}

at::Tensor batch(int rank, int step) {
  return (at::arange(2 * kWidth, at::kFloat).view({2, kWidth}) + rank + step).remainder(5.0) - 2.0;
}

// One rank's model.
class Model {
 public:
  Model(LocalWorld& world, const World& shape, int rank) : rank_(rank) {
    const int p = shape.partition_size;
    const int group = rank / p;
    GroupInfo replicas{"replicate", {}, {}, group};
    GroupInfo everyone{"control", {}, {}, rank};
    for (int other = 0; other < shape.size(); ++other) {
      everyone.world_ranks.push_back(other);
      everyone.nodes.push_back(other / shape.ranks_per_node);
      if (other % p != rank % p) continue;
      replicas.world_ranks.push_back(other);
      replicas.nodes.push_back(other / shape.ranks_per_node);
    }
    const bool spans = p > shape.ranks_per_node;
    const std::string name = "group" + std::to_string(group);
    const int nodes = spans ? p / shape.ranks_per_node : 1;
    gather_ = std::make_unique<LocalHops>(world, nodes, p / nodes, shape.hierarchical && spans,
                                          rank % p, name + "/gather");
    reduce_ = std::make_unique<LocalHops>(world, nodes, p / nodes, shape.hierarchical && spans,
                                          rank % p, name + "/reduce");
    replicate_ = world.make_communicator(replicas);
    control_ = world.make_communicator(everyone);
    std::vector<std::shared_ptr<Unit>> units;
    for (int layer = 0; layer < kNumLayers; ++layer) units.push_back(make_unit(layer, p, rank % p));
    for (const auto& unit : units) unit->settings().gradient_factor = 1.0 / shape.size();
    engine_ = Engine::create(units, control_.get(), make_worker_streams());
  }

  at::Tensor forward(at::Tensor x) {
    for (int layer = 0; layer < kNumLayers; ++layer) {
      engine_->pre_forward(layer);
      x = x.mm(full_[static_cast<size_t>(layer)]).tanh();
      engine_->watch_outputs(layer, {x});
      engine_->post_forward(layer, /*failed=*/false);
    }
    return x;
  }

  Engine& engine() { return *engine_; }
  const at::Tensor& sharded(int layer) { return sharded_[static_cast<size_t>(layer)]; }
  ShardLayout::RowRange rows(int p) const {
    return ShardLayout({{{kWidth, kWidth}}}, p, 1).rows_of(0, rank_ % p);
  }

 private:
  std::shared_ptr<Unit> make_unit(int layer, int p, int partition_rank) {
    const ShardLayout layout({{{kWidth, kWidth}}}, p, layout_alignment(at::kFloat, at::kFloat));
    const ShardLayout::RowRange rows = layout.rows_of(0, partition_rank);
    const at::Tensor shard = at::zeros({layout.shard_numel()});
    const at::Tensor gradient = at::zeros({layout.shard_numel()});
    const int64_t num_rows = rows.last - rows.first;
    const auto own = [&](const at::Tensor& buffer) {
      return buffer.narrow(0, 0, num_rows * kWidth).view({num_rows, kWidth});
    };
    at::Tensor sharded = own(shard);
    sharded.copy_(initial_weight(layer).slice(0, rows.first, rows.last));
    sharded = sharded.detach();
    sharded.requires_grad_(true);
    sharded_.push_back(sharded);
    UnitOptions options;
    options.name = "layer" + std::to_string(layer);
    options.parameters = {{"weight", {kWidth, kWidth}, sharded, own(gradient), true}};
    options.shard = shard;
    options.gradient = gradient;
    options.partition_size = p;
    auto unit = std::make_shared<Unit>(
        options, UnitCommunicators{gather_->hops(), reduce_->hops(), replicate_.get()});
    at::Tensor full = unit->full_views()[0];
    full.requires_grad_(true);
    full_.push_back(full);
    unit->set_full_parameters({full});
    return unit;
  }

  int rank_;
  std::unique_ptr<LocalHops> gather_;
  std::unique_ptr<LocalHops> reduce_;
  std::unique_ptr<Communicator> replicate_;
  std::unique_ptr<Communicator> control_;
  std::vector<at::Tensor> full_;
  std::vector<at::Tensor> sharded_;
  std::shared_ptr<Engine> engine_;
};

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
