// The same training again and again on eight ranks, with random delays in every collective and
// every layer: no hang, and the same bits each time.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <chrono>
#include <random>
#include <thread>
#include <utility>

#include "support/chain_model.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::Model;
using testing::run_ranks;
using testing::World;

constexpr World kWorld = {4, 2, 4, true};  // two partition groups, each of two nodes
constexpr int kNumSteps = 3;
constexpr int kMicroSteps = 2;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr unsigned kNumRepeats = 20;
#else
constexpr unsigned kNumRepeats = 200;
#endif

// Sleeps up to 300 us, half of the times not at all.
class Delays {
 public:
  explicit Delays(unsigned seed) : random_(seed) {}
  void sleep() {
    const auto microseconds = static_cast<int>(random_() % 600);
    if (microseconds >= 300) return;
    std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
  }

 private:
  std::minstd_rand random_;
};

class DelayedCommunicator final : public Communicator {
 public:
  DelayedCommunicator(std::unique_ptr<Communicator> inner, unsigned seed)
      : Communicator(inner->group()),
        inner_(std::move(inner)),
        delays_(seed),
        now_(make_inline_stream()) {}
  void barrier() override { inner_->barrier(); }

 protected:
  Route gather_route() const override { return Route::kDirect; }
  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    delays_.sleep();
    inner_->all_gather(pairs, *now_);
    delays_.sleep();
  }
  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    delays_.sleep();
    inner_->reduce_scatter(pairs, *now_);
    delays_.sleep();
  }
  void do_all_reduce(const at::Tensor& tensor) override {
    delays_.sleep();
    inner_->all_reduce(tensor, *now_);
    delays_.sleep();
  }

 private:
  const std::unique_ptr<Communicator> inner_;
  Delays delays_;
  const std::unique_ptr<Stream> now_;
};

// Each rank's parameters after the training.
std::vector<at::Tensor> train(unsigned seed, const ResidencySettings& residency) {
  LocalWorld world(kWorld.size(), std::chrono::seconds(60));
  std::vector<at::Tensor> parameters(static_cast<size_t>(kWorld.size()));
  run_ranks(kWorld.size(), [&](int rank) {
    unsigned next_seed = seed * 1000 + static_cast<unsigned>(rank) * 100;
    const testing::MakeCommunicator make = [&](const GroupInfo& group) {
      return std::make_unique<DelayedCommunicator>(world.make_communicator(group), ++next_seed);
    };
    Model model(make, make_worker_streams(), kWorld, rank, testing::kNumLayers, residency, {});
    Delays delays(next_seed);
    model.set_compute([&](int, bool) { delays.sleep(); });
    for (int step = 0; step < kNumSteps; ++step) {
      for (int microstep = 0; microstep < kMicroSteps; ++microstep) {
        for (int layer = 0; layer < testing::kNumLayers; ++layer) {
          model.unit(layer).settings().synchronize_gradients = microstep == kMicroSteps - 1;
        }
        const int number = kMicroSteps * step + microstep;
        model.forward_nested(testing::batch(rank, number)).sum().backward();
      }
      std::vector<at::Tensor> all;
      for (int layer = 0; layer < testing::kNumLayers; ++layer) {
        at::Tensor sharded = model.sharded(layer);
        const c10::NoGradGuard no_grad;
        sharded.add_(sharded.grad(), -0.05);
        sharded.mutable_grad().reset();
        all.push_back(sharded.detach().clone().view({-1}));
      }
      parameters[static_cast<size_t>(rank)] = at::cat(all);
    }
  });
  return parameters;
}

TEST(RepeatedTraining, HasTheSameBitsEachTime) {
  const std::vector<ResidencySettings> residencies = {
      {}, {Residency::kBlock, Residency::kShard, Residency::kShard}};
  const std::vector<at::Tensor> expected = train(0, residencies[0]);
  for (unsigned repeat = 1; repeat <= kNumRepeats; ++repeat) {
    const std::vector<at::Tensor> found = train(repeat, residencies[repeat % 2]);
    for (size_t rank = 0; rank < found.size(); ++rank) {
      ASSERT_TRUE(at::equal(found[rank], expected[rank]))
          << "repeat " << repeat << ", rank " << rank;
    }
  }
}

}  // namespace
}  // namespace mics
