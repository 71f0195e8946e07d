// A chain of linear layers on one partition group of two nodes.
#pragma once

#include <chrono>
#include <functional>
#include <vector>

#include "support/chain_model.h"
#include "support/multi_rank.h"

namespace mics::testing {

inline constexpr World kTwoNodes = {2, 2, 4, true};
inline constexpr int kMicroSteps = 4;

inline void on_two_nodes(const std::function<void(LocalWorld&, int)>& body) {
  LocalWorld world(kTwoNodes.size(), std::chrono::seconds(60));
  run_ranks(kTwoNodes.size(), [&](int rank) { body(world, rank); });
}

inline void run_step(Model& model, int rank) {
  for (int step = 0; step < kMicroSteps; ++step) {
    for (int layer = 0; layer < kNumLayers; ++layer) {
      model.unit(layer).settings().synchronize_gradients = step == kMicroSteps - 1;
    }
    model.forward_nested(batch(rank, step)).sum().backward();
  }
}

inline std::vector<at::Tensor> gradients_of(Model& model) {
  std::vector<at::Tensor> gradients;
  for (int layer = 0; layer < kNumLayers; ++layer) {
    gradients.push_back(model.sharded(layer).grad().clone());
  }
  return gradients;
}

// Two models of one world must not use a communicator of the same name at a time: one after the
// other.
inline std::vector<std::vector<at::Tensor>> gradients_under(const ResidencySettings& residency) {
  std::vector<std::vector<at::Tensor>> gradients(static_cast<size_t>(kTwoNodes.size()));
  on_two_nodes([&](LocalWorld& world, int rank) {
    Model model(world, kTwoNodes, rank, residency);
    run_step(model, rank);
    gradients[static_cast<size_t>(rank)] = gradients_of(model);
  });
  return gradients;
}

}  // namespace mics::testing
