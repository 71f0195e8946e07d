// A chain of linear layers on ranks that are threads: engine and units without Python.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/variable.h>

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "mics/engine.h"
#include "support/local_hops.h"

namespace mics::testing {

inline constexpr int kWidth = 5;
inline constexpr int kNumLayers = 3;

struct World {
  int num_nodes;
  int ranks_per_node;
  int partition_size;
  bool hierarchical;
  [[nodiscard]] int size() const { return num_nodes * ranks_per_node; }
};

inline at::Tensor initial_weight(int layer, int width = kWidth) {
  return (at::arange(width * width, at::kFloat).view({width, width}) + layer).remainder(3.0) - 1.0;
}

inline at::Tensor batch(int rank, int step, int width = kWidth) {
  return (at::arange(2 * width, at::kFloat).view({2, width}) + rank + step).remainder(5.0) - 2.0;
}

// One rank's model.
class Model {
 public:
  Model(LocalWorld& world, const World& shape, int rank,
        const ResidencySettings& residency = ResidencySettings(), const Depths& depths = Depths())
      : Model(communicators_of(world), make_worker_streams(), shape, rank, kNumLayers, residency,
              depths) {}
  Model(const MakeCommunicator& make, std::shared_ptr<RuntimeStreams> streams, const World& shape,
        int rank, int num_layers, const ResidencySettings& residency, const Depths& depths,
        int width = kWidth)
      : rank_(rank), width_(width) {
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
    gather_ = std::make_unique<LocalHops>(make, nodes, p / nodes, shape.hierarchical && spans,
                                          rank % p, name + "/gather");
    reduce_ = std::make_unique<LocalHops>(make, nodes, p / nodes, shape.hierarchical && spans,
                                          rank % p, name + "/reduce");
    replicate_ = make(replicas);
    control_ = make(everyone);
    std::vector<std::shared_ptr<Unit>> units;
    for (int layer = 0; layer < num_layers; ++layer) units.push_back(make_unit(layer, p, rank % p));
    for (const auto& unit : units) {
      unit->settings().gradient_factor = 1.0 / shape.size();
      unit->settings().residency = residency;
    }
    engine_ = Engine::create(units, control_.get(), std::move(streams), depths);
  }

  // The layers one after the other, none inside another.
  at::Tensor forward(at::Tensor x) {
    for (int layer = 0; layer < kNumLayers; ++layer) x = call(layer, x, [](auto y) { return y; });
    return x;
  }
  // Layer 0 as a root: its forward applies its weight, then runs `inner` inside, and `at_end`.
  at::Tensor forward_nested(
      const at::Tensor& x, const std::vector<int>& inner = {1, 2},
      const std::function<void(const at::Tensor&)>& at_end = [](const at::Tensor&) {}) {
    return call(0, x, [&](at::Tensor y) {
      for (const int layer : inner) y = call(layer, y, [](auto z) { return z; });
      at_end(y);
      return y * 2.0;  // an output that is no inner layer's
    });
  }
  // The same, where the root applies the weight of layer `lent` itself, before and after the
  // others.
  at::Tensor forward_nested_lending(const at::Tensor& x, const std::vector<int>& inner, int lent) {
    const auto apply = [&](const at::Tensor& y) {
      engine_->lend(lent, /*is_group=*/false);
      return y.mm(full_[static_cast<size_t>(lent)]);
    };
    return call(0, x, [&](at::Tensor y) {
      y = apply(y);
      for (const int layer : inner) y = call(layer, y, [](auto z) { return z; });
      return apply(y) * 2.0;
    });
  }

  // Called inside the forward and inside the backward of each layer, while it is gathered.
  void set_compute(std::function<void(int layer, bool backward)> compute) {
    compute_ = std::move(compute);
  }

  Engine& engine() { return *engine_; }
  Unit& unit(int layer) { return *engine_->units()[static_cast<size_t>(layer)]; }
  const LocalHops& gather() const { return *gather_; }
  const LocalHops& reduce() const { return *reduce_; }
  const Traffic& replicate() const { return replicate_->traffic(); }
  const at::Tensor& sharded(int layer) { return sharded_[static_cast<size_t>(layer)]; }
  ShardLayout::RowRange rows(int p) const {
    return ShardLayout({{{width_, width_}}}, p, 1).rows_of(0, rank_ % p);
  }

 private:
  template <typename Inside>
  at::Tensor call(int layer, const at::Tensor& x, const Inside& inside) {
    engine_->pre_forward(layer);
    const at::Tensor product = x.mm(full_[static_cast<size_t>(layer)]);
    if (compute_) {
      compute_(layer, /*backward=*/false);
      product.register_hook(
          [this, layer](const at::Tensor&) { compute_(layer, /*backward=*/true); });
    }
    const at::Tensor y = inside(product.tanh());
    engine_->watch_outputs(layer, {y});
    engine_->post_forward(layer, /*failed=*/false);
    return y;
  }

  std::shared_ptr<Unit> make_unit(int layer, int p, int partition_rank) {
    const ShardLayout layout({{{width_, width_}}}, p, layout_alignment(at::kFloat, at::kFloat));
    const ShardLayout::RowRange rows = layout.rows_of(0, partition_rank);
    const at::Tensor shard = at::zeros({layout.shard_numel()});
    const at::Tensor gradient = at::zeros({layout.shard_numel()});
    const int64_t num_rows = rows.last - rows.first;
    const auto own = [&](const at::Tensor& buffer) {
      return buffer.narrow(0, 0, num_rows * width_).view({num_rows, width_});
    };
    at::Tensor sharded = own(shard);
    sharded.copy_(initial_weight(layer, width_).slice(0, rows.first, rows.last));
    sharded = sharded.detach();
    sharded.requires_grad_(true);
    sharded_.push_back(sharded);
    UnitOptions options;
    options.name = "layer" + std::to_string(layer);
    options.parameters = {{"weight", {width_, width_}, sharded, own(gradient)}};
    options.shard = shard;
    options.gradient = gradient;
    options.partition_size = p;
    options.has_nested_units = layer == 0;
    auto unit = std::make_shared<Unit>(
        options, UnitCommunicators{gather_->hops(), reduce_->hops(), replicate_.get()});
    at::Tensor full = unit->parameters().full_views()[0];
    full.requires_grad_(true);
    full_.push_back(full);
    unit->parameters().set_full({full});
    return unit;
  }

  int rank_;
  int width_;
  std::function<void(int, bool)> compute_;
  std::unique_ptr<LocalHops> gather_;
  std::unique_ptr<LocalHops> reduce_;
  std::unique_ptr<Communicator> replicate_;
  std::unique_ptr<Communicator> control_;
  std::vector<at::Tensor> full_;
  std::vector<at::Tensor> sharded_;
  std::shared_ptr<Engine> engine_;
};

}  // namespace mics::testing
