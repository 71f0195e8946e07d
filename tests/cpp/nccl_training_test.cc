// Training through the production NCCL code over fakes: engine, units, pipelines, communicators and
// streams are those of a CUDA rank.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

#include "mics/local_world.h"
#include "support/chain_model.h"
#include "support/multi_rank.h"
#include "support/nccl_ranks.h"

namespace mics {
namespace {

using testing::batch;
using testing::kNumLayers;
using testing::Model;
using testing::NcclRanks;
using testing::run_ranks;
using testing::World;

constexpr int kMicroSteps = 3;

struct Case {
  std::string name;
  World world;
  ResidencySettings residency;
};

void PrintTo(const Case& what, std::ostream* out) { *out << what.name; }

// Gradients of a step, by layer, of each of several steps.
using Gradients = std::vector<at::Tensor>;

Gradients train(Model& model, int rank, int num_steps) {
  Gradients gradients;
  for (int step = 0; step < num_steps; ++step) {
    for (int microstep = 0; microstep < kMicroSteps; ++microstep) {
      for (int layer = 0; layer < kNumLayers; ++layer) {
        model.engine().unit(layer).settings().synchronize_gradients = microstep == kMicroSteps - 1;
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

std::vector<Gradients> train_locally(const Case& what, int num_steps) {
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
        model_([this](GroupInfo group) { return world_->make_communicator(std::move(group)); },
               testing::make_streams(*world_), what.world, rank, kNumLayers, what.residency,
               Depths()) {}
  ~Rank() { EXPECT_NO_THROW(world_->close()); }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;
  Model& model() { return model_; }

 private:
  const std::shared_ptr<NcclWorld> world_;
  Model model_;
};

std::vector<Gradients> train_over_nccl(NcclRanks& ranks, const Case& what, int num_steps) {
  std::vector<Gradients> found(static_cast<size_t>(what.world.size()));
  run_ranks(what.world.size(), [&](int rank) {
    Rank one(ranks, what, rank);
    found[static_cast<size_t>(rank)] = train(one.model(), rank, num_steps);
  });
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
  EXPECT_EQ(ranks.network().num_live_comms, 0);
  return found;
}

void expect_bitwise_equal(const std::vector<Gradients>& found,
                          const std::vector<Gradients>& expected) {
  for (size_t rank = 0; rank < expected.size(); ++rank) {
    ASSERT_EQ(found[rank].size(), expected[rank].size());
    for (size_t i = 0; i < expected[rank].size(); ++i) {
      ASSERT_TRUE(at::equal(found[rank][i], expected[rank][i])) << "rank " << rank << ", " << i;
    }
  }
}

class NcclTraining : public ::testing::TestWithParam<Case> {};

TEST_P(NcclTraining, GivesTheBitsOfTheLocalBackend) {
  const auto expected = train_locally(GetParam(), 2);
  NcclRanks ranks(GetParam().world.size());
  expect_bitwise_equal(train_over_nccl(ranks, GetParam(), 2), expected);
}

// Streams that run late, each in its own way: an edge that is missing shows as other bits.
TEST_P(NcclTraining, RandomDelaysChangeNothing) {
  const auto expected = train_locally(GetParam(), 2);
  for (unsigned seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(seed);
    NcclRanks ranks(GetParam().world.size(), seed);
    expect_bitwise_equal(train_over_nccl(ranks, GetParam(), 2), expected);
  }
}

constexpr Residency kShard = Residency::kShard;
constexpr Residency kBlock = Residency::kBlock;
constexpr Residency kFull = Residency::kFull;

std::vector<Case> cases() {
  std::vector<Case> found;
  for (const int size : {1, 2, 4, 8}) {
    for (int local = 1; local <= size; local *= 2) {
      for (int p = 1; p <= size; p *= 2) {
        for (const bool hierarchical : {false, true}) {
          if (hierarchical && p <= local) continue;  // one node: there is nothing to choose
          found.push_back({std::to_string(size) + "ranks_" + std::to_string(local) + "local_p" +
                               std::to_string(p) + (hierarchical ? "_hierarchical" : ""),
                           {size / local, local, p, hierarchical},
                           {}});
        }
      }
    }
  }
  found.push_back({"blocks", {2, 2, 4, true}, {kBlock, kBlock, kBlock}});
  found.push_back({"full", {2, 2, 4, true}, {kFull, kFull, kShard}});
  return found;
}

INSTANTIATE_TEST_SUITE_P(Worlds, NcclTraining, ::testing::ValuesIn(cases()),
                         [](const ::testing::TestParamInfo<Case>& what) {
                           return what.param.name;
                         });

}  // namespace
}  // namespace mics
