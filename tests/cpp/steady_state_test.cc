// What a step costs beside compute and collectives, counted: no allocation, no copy. Collectives
// move nothing here (ScheduleRecorder), so whatever is counted is the runtime's own.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <ostream>

#include "runtime/runtime_memory.h"
#include "support/chain_model.h"
#include "support/counting.h"
#include "support/schedule_recorder.h"

namespace mics {
namespace {

using testing::CopyCounter;
using testing::CountingAllocator;
using testing::Model;
using testing::World;

constexpr int kWidth = 8;  // divides by every partition size here, and by the alignment
constexpr int kNumLayers = 4;
constexpr int kMicroSteps = 3;

struct Case {
  const char* name;
  World world;
  ResidencySettings residency;
};

void PrintTo(const Case& what, std::ostream* out) { *out << what.name; }

class SteadyState : public ::testing::TestWithParam<Case> {
 protected:
  SteadyState()
      : model_([this](GroupInfo group) { return recorder_.make_communicator(std::move(group)); },
               recorder_.make_streams(), GetParam().world, /*rank=*/0, kNumLayers,
               GetParam().residency, Depths(), kWidth) {
    for (int layer = 0; layer < kNumLayers; ++layer) {
      weights_.push_back(testing::initial_weight(layer, kWidth).requires_grad_(true));
    }
    (void)allocator_.take_sizes();
  }

  // The same compute without the runtime. Gradients are dropped as the runtime takes them away.
  void run_alone() {
    for (int microstep = 0; microstep < kMicroSteps; ++microstep) {
      at::Tensor x = testing::batch(0, microstep, kWidth);
      for (const at::Tensor& weight : weights_) x = x.mm(weight).tanh();
      (x * 2.0).sum().backward();
      for (const at::Tensor& weight : weights_) weight.mutable_grad().reset();
    }
  }

  void run_step() {
    for (int microstep = 0; microstep < kMicroSteps; ++microstep) {
      for (int layer = 0; layer < kNumLayers; ++layer) {
        model_.unit(layer).settings().synchronize_gradients = microstep == kMicroSteps - 1;
      }
      model_.forward_nested(testing::batch(0, microstep, kWidth), {1, 2, 3}).sum().backward();
    }
    for (int layer = 0; layer < kNumLayers; ++layer) model_.sharded(layer).mutable_grad().reset();
  }

  testing::ScheduleRecorder recorder_;
  CountingAllocator allocator_;
  Model model_;
  std::vector<at::Tensor> weights_;  // of the compute alone
};

// What is in `sizes` and not in `others`, both ascending.
std::vector<size_t> without(const std::vector<size_t>& sizes, const std::vector<size_t>& others) {
  std::vector<size_t> rest;
  std::set_difference(sizes.begin(), sizes.end(), others.begin(), others.end(),
                      std::back_inserter(rest));
  return rest;
}

TEST_P(SteadyState, FirstStepAllocatesThePlanAndLaterOnesNothing) {
  run_alone();
  const std::vector<size_t> compute = allocator_.take_sizes();
  ASSERT_FALSE(compute.empty());

  run_step();
  const std::vector<size_t> first = allocator_.take_sizes();
  // The factor 1/n and the plan, to the byte.
  const auto plan = static_cast<size_t>(model_.engine().memory().nbytes());
  EXPECT_EQ(without(first, compute), (std::vector<size_t>{sizeof(float), plan}));

  for (int step = 0; step < 3; ++step) {
    run_step();
    const std::vector<size_t> sizes = allocator_.take_sizes();
    EXPECT_EQ(without(sizes, compute), std::vector<size_t>()) << "step " << step;
    EXPECT_EQ(without(compute, sizes), std::vector<size_t>()) << "step " << step;
  }
  EXPECT_EQ(model_.engine().memory().num_grown(), 0);
}

TEST_P(SteadyState, NothingIsCopiedBesideCollectivesAndSums) {
  CopyCounter counter;
  run_alone();
  const std::map<std::string, int> compute = counter.take();
  run_step();
  (void)counter.take();
  run_step();
  std::map<std::string, int> expected = compute;
  // The scaling by 1/n, once per unit and step.
  expected["aten::mul_"] += kNumLayers;
  // Sums over micro-steps: of each after the first, one addition.
  expected["aten::add_"] += (kMicroSteps - 1) * kNumLayers;
  EXPECT_EQ(counter.take(), expected);
}

constexpr Residency kShard = Residency::kShard;
constexpr Residency kBlock = Residency::kBlock;
constexpr Residency kFull = Residency::kFull;

INSTANTIATE_TEST_SUITE_P(
    Worlds, SteadyState,
    ::testing::Values(Case{"one_node", {1, 4, 4, true}, {}}, Case{"two_nodes", {2, 2, 4, true}, {}},
                      Case{"two_nodes_flat", {2, 2, 4, false}, {}},
                      Case{"replicas", {4, 2, 4, true}, {}},
                      Case{"blocks", {2, 2, 4, true}, {kBlock, kBlock, kBlock}},
                      Case{"full", {2, 2, 4, true}, {kFull, kFull, kShard}}),
    [](const ::testing::TestParamInfo<Case>& what) { return what.param.name; });

}  // namespace
}  // namespace mics
