// Training of a small model through the production NCCL code over fakes, and on the local backend
// to compare with.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "mics/local_world.h"
#include "support/chain_model.h"
#include "support/multi_rank.h"
#include "support/nccl_ranks.h"
#include "support/poisoned_memory.h"

namespace mics::testing {

inline constexpr int kMicroSteps = 3;

struct Case {
  std::string name;
  World world;
  ResidencySettings residency;
};

inline void PrintTo(const Case& what, std::ostream* out) { *out << what.name; }

// Gradients of a step, by layer, of each of several steps.
using Gradients = std::vector<at::Tensor>;

inline Gradients train(Model& model, int rank, int num_steps) {
  Gradients gradients;
  for (int step = 0; step < num_steps; ++step) {
    for (int microstep = 0; microstep < kMicroSteps; ++microstep) {
      for (int layer = 0; layer < kNumLayers; ++layer) {
        model.unit(layer).settings().synchronize_gradients = microstep == kMicroSteps - 1;
      }
      model.forward_nested(batch(rank, step + microstep)).sum().backward();
    }
    for (int layer = 0; layer < kNumLayers; ++layer) {
      gradients.push_back(model.sharded(layer).grad().clone());
      at::Tensor sharded = model.sharded(layer);
      const c10::NoGradGuard no_grad;
      sharded.sub_(sharded.grad(), 0.01);
      sharded.mutable_grad().reset();
    }
  }
  return gradients;
}

inline std::vector<Gradients> train_locally(const Case& what, int num_steps) {
  std::vector<Gradients> found(static_cast<size_t>(what.world.size()));
  LocalWorld world(what.world.size(), std::chrono::seconds(60));
  run_ranks(what.world.size(), [&](int rank) {
    Model model(world, what.world, rank, what.residency);
    found[static_cast<size_t>(rank)] = train(model, rank, num_steps);
  });
  return found;
}

// One rank's world, model and streams; closed in order.
class Rank {
 public:
  Rank(NcclRanks& ranks, const Case& what, int rank)
      : world_(ranks.make_world(rank)),
        model_(
            [this](GroupInfo group) {
              const bool only_gathers = has(group.name, "/gather/intra");
              const NcclDirection direction = has(group.name, "/reduce/") ? NcclDirection::kReduce
                                              : group.name == "replicate"
                                                  ? NcclDirection::kReplicate
                                                  : NcclDirection::kGather;
              return world_->make_communicator(std::move(group), direction, only_gathers);
            },
            make_streams(*world_), what.world, rank, kNumLayers, what.residency, Depths()) {}
  ~Rank() { EXPECT_NO_THROW(world_->close(std::chrono::seconds(30))); }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;
  Model& model() { return model_; }
  NcclWorld& world() { return *world_; }

 private:
  const std::shared_ptr<NcclWorld> world_;
  Model model_;
};

inline std::vector<Gradients> train_over_nccl(NcclRanks& ranks, const Case& what, int num_steps) {
  const PoisonedMemory poisoned;
  std::vector<Gradients> found(static_cast<size_t>(what.world.size()));
  run_ranks(what.world.size(), [&](int rank) {
    Rank one(ranks, what, rank);
    found[static_cast<size_t>(rank)] = train(one.model(), rank, num_steps);
  });
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
  EXPECT_EQ(ranks.network().num_live_comms, 0);
  return found;
}

inline void expect_bitwise_equal(const std::vector<Gradients>& found,
                                 const std::vector<Gradients>& expected) {
  for (size_t rank = 0; rank < expected.size(); ++rank) {
    ASSERT_EQ(found[rank].size(), expected[rank].size());
    for (size_t i = 0; i < expected[rank].size(); ++i) {
      ASSERT_TRUE(at::equal(found[rank][i], expected[rank][i])) << "rank " << rank << ", " << i;
    }
  }
}

}  // namespace mics::testing
