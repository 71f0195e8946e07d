// What goes wrong once an NCCL world runs: every fault ends in an error on all ranks, in time.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

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

// Of faults that only a time-out shows. What comes before them needs less on a busy machine too.
constexpr milliseconds kTimeout(2000);
// Of the others: a fault that ended by it would end too late.
constexpr milliseconds kNoTimeout(600000);
// Of every fault, beside kTimeout, on a busy machine.
constexpr std::chrono::seconds kMargin(60);
// Less than the 10 s after which reset() gives up waiting for what is queued.
constexpr std::chrono::seconds kResetLimit(8);

// Runs `body(rank, communicator, stream)` on all ranks, which must end in an error on each in time;
// then nothing may be left.
std::vector<std::string> errors_of_fault(
    NcclRanks& ranks, int size, milliseconds timeout,
    const std::function<void(int, NcclWorld&, Communicator&, Stream&)>& body) {
  for (int rank = 0; rank < size; ++rank) {
    ranks.options(rank).timeout = timeout;
    ranks.options(rank).start_timeout = timeout;
  }
  std::vector<int> everyone;
  for (int rank = 0; rank < size; ++rank) everyone.push_back(rank);
  const auto errors = errors_of(size, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of(everyone, rank));
    const auto stream = world->make_stream(false);
    const auto begin = std::chrono::steady_clock::now();
    try {
      body(rank, *world, *communicator, *stream);
    } catch (const Error&) {
      EXPECT_LT(std::chrono::steady_clock::now() - begin, kTimeout + kMargin);
      EXPECT_THROW(communicator->all_reduce(at::ones({1}), *stream), Error);
      EXPECT_TRUE(stream->has_failed());
      // Aborted by the world, not only by its destructors: what was queued has ended.
      const auto reset = std::chrono::steady_clock::now();
      stream->reset();
      EXPECT_LT(std::chrono::steady_clock::now() - reset, kResetLimit);
      EXPECT_ANY_THROW(world->close(std::chrono::seconds(30)));
      throw;
    }
  });
  EXPECT_EQ(ranks.network().num_live_comms, 0);
  return errors;
}

TEST(NcclFault, RankThatIsGoneMidGatherIsATimeoutOnTheOthers) {
  NcclRanks ranks(4);
  const auto errors = errors_of_fault(
      ranks, 4, kTimeout, [](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        const at::Tensor output = at::zeros({4});
        communicator.all_gather(output, at::ones({1}), stream, "layers.0");
        stream.synchronize();
        if (rank == 3) return;  // its destructors abort, as the end of a process does
        communicator.all_gather(output, at::ones({1}), stream, "layers.1");
        stream.synchronize();
      });
  for (int rank = 0; rank < 3; ++rank) {
    const std::string& error = errors[static_cast<size_t>(rank)];
    EXPECT_TRUE(has(error, "operation 2, all_gather of unit \"layers.1\", has run for ") ||
                has(error, "another rank's collective failed"))
        << error;
  }
}

TEST(NcclFault, RankThatDoesSomethingElseLearnsOfTheFailureThroughTheStore) {
  NcclRanks ranks(2);
  const auto errors =
      errors_of_fault(ranks, 2, kTimeout,
                      [](int rank, NcclWorld& world, Communicator& communicator, Stream& stream) {
                        if (rank == 0) {
                          communicator.all_reduce(at::ones({1}), stream);
                          return stream.synchronize();
                        }
                        // In no collective: only the watchdog can tell.
                        const auto idle = world.make_stream(false);
                        while (!idle->has_failed()) std::this_thread::sleep_for(milliseconds(5));
                        idle->synchronize();
                      });
  EXPECT_TRUE(has(errors[0], "has run for")) << errors[0];
  EXPECT_TRUE(has(errors[1], "world_rank 0: every member of a group must issue")) << errors[1];
}

TEST(NcclFault, AsyncErrorOfOneRankEndsAll) {
  NcclRanks ranks(3);
  const auto errors = errors_of_fault(
      ranks, 3, kNoTimeout, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        communicator.all_reduce(at::ones({1}), stream);
        stream.synchronize();
        if (rank == 1) {
          ranks.nccl(1).set_async_error(ncclRemoteError);
          while (!stream.has_failed()) std::this_thread::sleep_for(milliseconds(5));
        } else {
          communicator.all_reduce(at::ones({1}), stream);
        }
        stream.synchronize();
      });
  EXPECT_TRUE(has(errors[1],
                  "NCCL reported an error in group test [0 1 2], world_rank=1: remote "
                  "process exited"))
      << errors[1];
  for (const int rank : {0, 2}) EXPECT_FALSE(errors[static_cast<size_t>(rank)].empty());
}

TEST(NcclFault, MismatchedCallsAreATimeoutAndNotAWrongResult) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, kTimeout, [](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        communicator.all_reduce(at::ones({rank == 0 ? 4 : 5}), stream);
        stream.synchronize();
      });
  for (const std::string& error : errors) EXPECT_FALSE(error.empty());
  EXPECT_EQ(ranks.network().faults().front(), "id 1: other counts");
}

TEST(NcclFault, OperationWhoseStreamNeverReachesItIsNamedAsWaiting) {
  std::atomic<bool> is_over = false;
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, kTimeout, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        // Compute before it that does not end.
        if (rank == 0) {
          stream.enqueue([&] {
            while (!is_over) std::this_thread::sleep_for(milliseconds(5));
          });
        }
        communicator.all_reduce(at::ones({1}), stream);
        try {
          stream.synchronize();
        } catch (...) {
          if (rank == 0) is_over = true;
          throw;
        }
      });
  EXPECT_TRUE(has(errors[0], "has waited to start for") || has(errors[0], "another rank"))
      << errors[0];
}

TEST(NcclFault, CloseNamesTheOperationThatAPeerHasNotIssued) {
  NcclRanks ranks(2);
  std::atomic<bool> is_closed = false;
  const auto errors = errors_of(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank, "gather/intra"));
    const auto stream = world->make_stream(false);
    if (rank == 0) {
      communicator->all_reduce(at::ones({1}), *stream, "layers.0");
      communicator->all_reduce(at::ones({1}), *stream, "layers.1");
      try {
        world->close(milliseconds(100));
      } catch (...) {
        is_closed = true;
        throw;
      }
    }
    while (!is_closed) std::this_thread::sleep_for(milliseconds(1));
  });
  EXPECT_TRUE(has(errors[0],
                  "got operation 1, all_reduce of unit \"layers.0\", still in flight, "
                  "and 1 after it (group gather/intra [0 1], world_rank=0)"))
      << errors[0];
}

TEST(NcclFault, FailureOfAnotherRankEndsACloseThatWaits) {
  NcclRanks ranks(2);
  for (int rank = 0; rank < 2; ++rank) ranks.options(rank).is_blocking = false;
  ranks.nccl(0).stall_ends();
  const auto begin = std::chrono::steady_clock::now();
  const auto errors = errors_of(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({rank}, rank));
    if (rank == 0) return world->close(kMargin);
    ranks.nccl(1).set_async_error(ncclRemoteError);
    const auto stream = world->make_stream(false);
    while (!stream->has_failed()) std::this_thread::sleep_for(milliseconds(1));
    stream->synchronize();
  });
  EXPECT_LT(std::chrono::steady_clock::now() - begin, kMargin);
  EXPECT_TRUE(has(errors[0],
                  "a communicator was aborted during ncclCommFinalize: something has failed "
                  "meanwhile (group test [0], world_rank=0)"))
      << errors[0];
  EXPECT_TRUE(has(errors[1], "NCCL reported an error")) << errors[1];
}

TEST(NcclFault, WatchdogLeavesTheCaptureOfAGraphAlone) {
  NcclRanks ranks(2);
  std::atomic<bool> is_captured = false;
  const auto errors = errors_of(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto stream = world->make_stream(false);
    if (rank == 0) {
      communicator->all_reduce(at::ones({1}), *stream);
      ranks.cuda(0).set_capturing(true);
      while (ranks.cuda(0).num_captured_queries() < 3 && !stream->has_failed()) {
        std::this_thread::sleep_for(milliseconds(1));
      }
      ranks.cuda(0).set_capturing(false);
      is_captured = true;
    } else {
      while (!is_captured) std::this_thread::sleep_for(milliseconds(1));
      communicator->all_reduce(at::ones({1}), *stream);
    }
    world->close(std::chrono::seconds(30));
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

TEST(NcclFault, ErrorOfALaunchIsThrownByTheCall) {
  for (const char* call : {"all_gather", "group_end"}) {
    NcclRanks ranks(2);
    const auto errors = errors_of_fault(
        ranks, 2, kNoTimeout,
        [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
          if (rank == 0) ranks.nccl(0).fail(call, ncclInternalError);
          communicator.all_gather(
              {{at::zeros({4}), at::ones({2})}, {at::zeros({2}), at::ones({1})}}, stream);
          stream.synchronize();
        });
    EXPECT_TRUE(has(errors[0], "failed: result 3 (group ")) << errors[0];
    EXPECT_FALSE(errors[1].empty());
  }
}

TEST(NcclFault, ErrorOfTheDeviceEndsTheWorld) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, kNoTimeout, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        if (rank == 0) ranks.cuda(0).break_device();
        communicator.all_reduce(at::ones({1}), stream);
        stream.synchronize();
      });
  EXPECT_TRUE(has(errors[0], "unspecified launch failure")) << errors[0];
}

TEST(NcclFault, ReportHasTheTableOfTheFlightLog) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, kTimeout, [](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        auto log = std::make_shared<FlightLog>();
        log->set_reporter([](const FlightLog& of) {
          return std::string("in operation: ") + of.progress().front().current;
        });
        communicator.set_flight_log(log);
        if (rank == 0) communicator.all_reduce(at::ones({1}), stream, "head");
        stream.synchronize();
        while (!stream.has_failed()) std::this_thread::sleep_for(milliseconds(5));
        stream.synchronize();
      });
  EXPECT_TRUE(has(errors[0], "\nin operation: all_reduce of unit \"head\"")) << errors[0];
}

}  // namespace
}  // namespace mics
