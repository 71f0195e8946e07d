// How communicators of NCCL end: by close() or by an abort, at a point that all ranks share, and
// never under a call of another thread.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "mics/error.h"
#include "mics/nccl_world.h"
#include "support/multi_rank.h"
#include "support/nccl_ranks.h"

namespace mics {
namespace {

using std::chrono::milliseconds;
using testing::errors_of;
using testing::group_of;
using testing::has;
using testing::NcclRanks;
using testing::run_ranks;

// Of everything here, on a busy machine.
constexpr std::chrono::seconds kMargin(60);
// Inside NCCL: the watchdog, which looks every 10 ms, sees the error meanwhile.
constexpr milliseconds kInside(1000);

// Runs `body` on all ranks. NCCL reports an error on rank 0 as soon as a call is inside it there, and
// then everything ends, with that error.
void expect_error_during_a_call(NcclRanks& ranks, int size, const std::function<void(int)>& body) {
  std::atomic<bool> is_over = false;
  std::thread breaker([&] {
    while (!ranks.nccl(0).is_inside() && !is_over) std::this_thread::yield();
    ranks.nccl(0).set_async_error(ncclRemoteError);
  });
  const auto errors = errors_of(size, body);
  is_over = true;
  breaker.join();
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
  EXPECT_EQ(ranks.network().num_live_comms, 0);
  for (const std::string& error : errors)
    EXPECT_TRUE(has(error, "NCCL reported an error")) << error;
}

// A real abort may wait for the device, and so for the other communicator's collective.
TEST(NcclEnd, CommunicatorsThatAreBusyAreAbortedInOneGroup) {
  for (const bool has_group_abort : {true, false}) {
    NcclRanks ranks(2);
    if (!has_group_abort) ranks.nccl(0).set_has_no_group_abort();
    std::atomic<bool> is_failed = false;
    const auto errors = errors_of(2, [&](int rank) {
      const auto world = ranks.make_world(rank);
      const auto gather = world->make_communicator(group_of({0, 1}, rank, "gather/intra"));
      const auto reduce = world->make_communicator(group_of({0, 1}, rank, "reduce/intra"));
      const auto first = world->make_stream(false);
      const auto second = world->make_stream(false);
      (void)ranks.nccl(rank).take_counts();
      if (rank == 0) {
        gather->all_reduce(at::ones({1}), *first);
        reduce->all_reduce(at::ones({1}), *second);
        while (ranks.nccl(0).most_under_way() < 2) std::this_thread::sleep_for(milliseconds(1));
        ranks.nccl(0).set_async_error(ncclRemoteError);
        while (!first->has_failed()) std::this_thread::sleep_for(milliseconds(1));
        first->reset();
        second->reset();
        is_failed = true;
        auto counts = ranks.nccl(0).take_counts();
        EXPECT_EQ(counts["comm_abort"], 2);
        EXPECT_EQ(counts["group_start"], has_group_abort ? 1 : 0);
        first->synchronize();
      }
      while (!is_failed) std::this_thread::sleep_for(milliseconds(1));
    });
    EXPECT_TRUE(has(errors[0], "NCCL reported an error")) << errors[0];
    // What an older library cannot help: that is what the fake is for.
    EXPECT_EQ(ranks.network().faults().empty(), has_group_abort);
    EXPECT_EQ(ranks.network().num_live_comms, 0);
  }
}

TEST(NcclEnd, AbortWaitsForALaunchOfAnotherThread) {
  NcclRanks ranks(2);
  ranks.nccl(0).delay("all_reduce", kInside);
  expect_error_during_a_call(ranks, 2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto stream = world->make_stream(false);
    communicator->all_reduce(at::ones({1}), *stream);
    while (!stream->has_failed()) std::this_thread::sleep_for(milliseconds(1));
    stream->synchronize();
  });
}

// A start of connections that waits for a peer: only the abort can end it.
TEST(NcclEnd, LaunchThatStaysInNcclIsAbortedInTheEnd) {
  NcclRanks ranks(2);
  ranks.nccl(0).stall_launches();
  ranks.options(0).launch_patience = milliseconds(200);
  const auto begin = std::chrono::steady_clock::now();
  expect_error_during_a_call(ranks, 2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto stream = world->make_stream(false);
    communicator->all_reduce(at::ones({1}), *stream);
    stream->synchronize();
  });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, kMargin);
}

TEST(NcclEnd, AbortWaitsForACloseThatIsInsideNccl) {
  NcclRanks ranks(1);
  ranks.nccl(0).delay("comm_finalize", kInside);
  expect_error_during_a_call(ranks, 1, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0}, rank));
    world->close(std::chrono::seconds(30));
  });
}

// A model that Python collects on one rank, early or late, ends nothing on any.
TEST(NcclEnd, CommunicatorsEndWithTheirWorldAndNotWhenTheyAreDestroyed) {
  NcclRanks ranks(2);
  run_ranks(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto kept = world->make_communicator(group_of({0, 1}, rank, "kept"));
    const auto stream = world->make_stream(false);
    communicator->all_reduce(at::ones({1}), *stream);
    if (rank == 0) communicator.reset();
    const at::Tensor tensor = at::ones({1});
    kept->all_reduce(tensor, *stream);
    stream->synchronize();
    EXPECT_EQ(tensor.item<float>(), 2.0F);
    communicator.reset();
    EXPECT_EQ(ranks.network().num_live_comms, 4);
    kept->barrier();  // the count is of both ranks
    auto counts = ranks.nccl(rank).take_counts();
    EXPECT_EQ(counts["comm_abort"], 0);
    world->close(std::chrono::seconds(30));
    EXPECT_EQ(ranks.nccl(rank).take_counts()["comm_abort"], 0);
  });
  EXPECT_EQ(ranks.network().num_live_comms, 0);
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
}

TEST(NcclEnd, OneThatAllMembersHaveLetGoOfIsUsedAgain) {
  NcclRanks ranks(2);
  run_ranks(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto stream = world->make_stream(false);
    const auto use = [&](Communicator& communicator) {
      const at::Tensor tensor = at::ones({1});
      communicator.all_reduce(tensor, *stream);
      stream->synchronize();
      EXPECT_EQ(tensor.item<float>(), 2.0F);
    };
    auto communicator = world->make_communicator(group_of({0, 1}, rank));
    use(*communicator);
    for (int model = 0; model < 3; ++model) {
      communicator.reset();
      communicator = world->make_communicator(group_of({0, 1}, rank));
      use(*communicator);
    }
    EXPECT_EQ(ranks.nccl(rank).take_counts()["comm_init_rank_config"], 1);
    // One rank still has it, so nobody may use it again; one of another name is another one.
    std::unique_ptr<Communicator> held;
    if (rank == 1) held = std::move(communicator);
    communicator = world->make_communicator(group_of({0, 1}, rank));
    use(*communicator);
    const auto other = world->make_communicator(group_of({0, 1}, rank, "other"));
    use(*other);
    EXPECT_EQ(ranks.nccl(rank).take_counts()["comm_init_rank_config"], 2);
    world->close(std::chrono::seconds(30));
  });
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
  EXPECT_EQ(ranks.network().num_live_comms, 0);
}

}  // namespace
}  // namespace mics
