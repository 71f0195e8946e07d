// The NCCL backend over fakes: how a world starts, fails and ends. What it computes is checked with
// the other backends in communicator_conformance_test.cc.
#include "mics/nccl_world.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <optional>
#include <random>
#include <thread>

#include "mics/error.h"
#include "support/multi_rank.h"
#include "support/nccl_ranks.h"

namespace mics {
namespace {

using std::chrono::milliseconds;
using testing::NcclRanks;
using testing::run_ranks;

GroupInfo group_of(const std::vector<int>& world_ranks, int world_rank,
                   const std::string& name = "test") {
  GroupInfo group{name, world_ranks, std::vector<int>(world_ranks.size(), 0), 0};
  while (group.world_ranks[static_cast<size_t>(group.rank)] != world_rank) ++group.rank;
  return group;
}

// What `body` throws on each rank; empty: nothing.
std::vector<std::string> errors_of(int size, const std::function<void(int)>& body) {
  std::vector<std::string> errors(static_cast<size_t>(size));
  run_ranks(size, [&](int rank) {
    try {
      body(rank);
    } catch (const Error& error) {
      errors[static_cast<size_t>(rank)] = error.what();
    }
  });
  return errors;
}

bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// --- start ---------------------------------------------------------------------------------------

TEST(NcclStart, MixedVersionsAreRefusedOnEveryRank) {
  NcclRanks ranks(3);
  ranks.nccl(1).set_version(22304);
  for (const std::string& error : errors_of(3, [&](int rank) { (void)ranks.make_world(rank); })) {
    EXPECT_TRUE(has(error, "2.23.4 on world_rank 1")) << error;
  }
}

TEST(NcclStart, TwoRanksOnOneGpuAreRefusedOnEveryRank) {
  NcclRanks ranks(2);
  ranks.options(1).host = "other";  // one bus id on two hosts is two GPUs
  EXPECT_EQ(
      errors_of(2, [&](int rank) { ranks.make_world(rank)->close(std::chrono::seconds(30)); }),
      std::vector<std::string>(2));
  const auto store = c10::make_intrusive<c10d::HashStore>();
  const auto network = std::make_shared<testing::FakeNetwork>();
  const auto errors = errors_of(2, [&](int rank) {
    const auto cuda = std::make_shared<testing::FakeCuda>("0000:00:0");
    NcclOptions options = ranks.options(0);
    options.rank = rank;
    (void)NcclWorld::create(store, options, cuda,
                            std::make_shared<testing::FakeNccl>(network, cuda));
  });
  for (const std::string& error : errors) {
    EXPECT_TRUE(has(error, "got GPU 0000:00:0 of host host on world_rank 0 and 1")) << error;
  }
}

TEST(NcclStart, MissingRankAndMissingMemberAreNamed) {
  NcclRanks ranks(3);
  for (int rank = 0; rank < 3; ++rank) ranks.options(rank).init_timeout = milliseconds(300);
  auto errors = errors_of(3, [&](int rank) {
    if (rank != 2) (void)ranks.make_world(rank);
  });
  EXPECT_TRUE(has(errors[0], "no answer from world ranks [2]")) << errors[0];

  NcclRanks others(3);
  for (int rank = 0; rank < 3; ++rank) others.options(rank).init_timeout = milliseconds(300);
  errors = errors_of(3, [&](int rank) {
    const auto world = others.make_world(rank);
    if (rank != 1) (void)world->make_communicator(group_of({0, 1, 2}, rank, "gather/rail"));
  });
  EXPECT_TRUE(has(errors[0], "no answer from world ranks [1]")) << errors[0];
  EXPECT_TRUE(has(errors[2], "gather/rail [0 1 2]")) << errors[2];
  EXPECT_EQ(others.network().num_live_comms, 0);
}

TEST(NcclStart, NonBlockingStartEndsOrIsGivenUpInTime) {
  for (const bool stalls : {false, true}) {
    NcclRanks ranks(2);
    for (int rank = 0; rank < 2; ++rank) {
      ranks.options(rank).is_blocking = false;
      ranks.options(rank).init_timeout = milliseconds(stalls ? 300 : 60000);
      if (stalls) ranks.nccl(rank).stall_starts();
    }
    const auto errors = errors_of(2, [&](int rank) {
      const auto world = ranks.make_world(rank);
      const auto communicator = world->make_communicator(group_of({0, 1}, rank));
      const at::Tensor tensor = at::ones({3});
      const auto stream = world->make_stream(false);
      communicator->all_reduce(tensor, *stream);
      stream->synchronize();
      EXPECT_TRUE(at::equal(tensor, at::full({3}, 2.0)));
      world->close(std::chrono::seconds(30));
    });
    for (const std::string& error : errors) {
      EXPECT_EQ(has(error, "ncclCommInitRankConfig must end in time"), stalls) << error;
    }
    EXPECT_EQ(ranks.network().num_live_comms, 0);
  }
}

TEST(NcclStart, ErrorOfNcclNamesTheCallAndTheGroup) {
  NcclRanks ranks(1);
  ranks.nccl(0).fail("comm_init_rank_config", ncclUnhandledCudaError);
  const auto errors = errors_of(1, [&](int rank) {
    (void)ranks.make_world(rank)->make_communicator(group_of({0}, 0, "gather/intra"));
  });
  EXPECT_TRUE(has(errors[0], "ncclCommInitRankConfig failed: result 1\" (group gather/intra [0]"))
      << errors[0];
}

TEST(NcclStart, SecondCommunicatorOfTheSameMembersIsSplit) {
  for (const bool has_split : {true, false}) {
    NcclRanks ranks(2);
    for (int rank = 0; rank < 2; ++rank) ranks.nccl(rank).set_has_split(has_split);
    run_ranks(2, [&](int rank) {
      const auto world = ranks.make_world(rank);
      const auto gather = world->make_communicator(group_of({0, 1}, rank, "gather/intra"));
      const auto reduce = world->make_communicator(group_of({0, 1}, rank, "reduce/intra"));
      const auto stream = world->make_stream(false);
      gather->all_reduce(at::ones({1}), *stream);
      reduce->all_reduce(at::ones({1}), *stream);
      // Its parents have been used: a split would wait for them.
      const auto later = world->make_communicator(group_of({0, 1}, rank, "later"));
      world->close(std::chrono::seconds(30));
      EXPECT_EQ(ranks.nccl(rank).take_counts()["comm_split"], has_split ? 1 : 0);
      EXPECT_EQ(world->notes().size(), has_split ? 1U : 2U);
    });
    EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
    EXPECT_EQ(ranks.network().num_live_comms, 0);
  }
}

// --- faults --------------------------------------------------------------------------------------

constexpr milliseconds kTimeout(400);
constexpr std::chrono::seconds kMargin(2);  // of every fault, beside the limit

// Runs `body(rank, communicator, stream)` on all ranks, which must end in an error on each in time;
// then nothing may be left.
std::vector<std::string> errors_of_fault(
    NcclRanks& ranks, int size,
    const std::function<void(int, NcclWorld&, Communicator&, Stream&)>& body) {
  for (int rank = 0; rank < size; ++rank) {
    ranks.options(rank).timeout = kTimeout;
    ranks.options(rank).start_timeout = kTimeout;
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
      ranks, 4, [](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        const at::Tensor output = at::zeros({4});
        communicator.all_gather(output, at::ones({1}), stream, "layers.0");
        stream.synchronize();
        if (rank == 3) return;  // its destructors abort, as the end of a process does
        communicator.all_gather(output, at::ones({1}), stream, "layers.1");
        stream.synchronize();
      });
  for (int rank = 0; rank < 3; ++rank) {
    const std::string& error = errors[static_cast<size_t>(rank)];
    EXPECT_TRUE(has(error, "operation 2, all_gather of unit \"layers.1\", has run for 0.4") ||
                has(error, "another rank's collective failed"))
        << error;
  }
}

TEST(NcclFault, RankThatDoesSomethingElseLearnsOfTheFailureThroughTheStore) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, [](int rank, NcclWorld& world, Communicator& communicator, Stream& stream) {
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
      ranks, 3, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
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
                  "NCCL reported an error in group test [0 1 2] (world_rank=1): remote "
                  "process exited"))
      << errors[1];
  for (const int rank : {0, 2}) EXPECT_FALSE(errors[static_cast<size_t>(rank)].empty());
}

TEST(NcclFault, MismatchedCallsAreATimeoutAndNotAWrongResult) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, [](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
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
      ranks, 2, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
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

TEST(NcclFault, ErrorOfALaunchIsThrownByTheCall) {
  for (const char* call : {"all_gather", "group_end"}) {
    NcclRanks ranks(2);
    const auto errors = errors_of_fault(
        ranks, 2, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
          if (rank == 0) ranks.nccl(0).fail(call, ncclInternalError);
          communicator.all_gather(
              {{at::zeros({4}), at::ones({2})}, {at::zeros({2}), at::ones({1})}}, stream);
          stream.synchronize();
        });
    EXPECT_TRUE(has(errors[0], "failed: result 3")) << errors[0];
    EXPECT_FALSE(errors[1].empty());
  }
}

TEST(NcclFault, ErrorOfTheDeviceEndsTheWorld) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, [&](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
        if (rank == 0) ranks.cuda(0).break_device();
        communicator.all_reduce(at::ones({1}), stream);
        stream.synchronize();
      });
  EXPECT_TRUE(has(errors[0], "unspecified launch failure")) << errors[0];
}

TEST(NcclFault, ReportHasTheTableOfTheFlightLog) {
  NcclRanks ranks(2);
  const auto errors = errors_of_fault(
      ranks, 2, [](int rank, NcclWorld&, Communicator& communicator, Stream& stream) {
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

// --- use and end ---------------------------------------------------------------------------------

TEST(NcclUse, TensorsOfAnOperationLiveUntilItIsDone) {
  NcclRanks ranks(2);
  run_ranks(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto stream = world->make_stream(false);
    std::optional<c10::weak_intrusive_ptr<c10::StorageImpl>> input;
    const at::Tensor output = at::zeros({2});
    {
      const at::Tensor piece = at::full({1}, rank + 1.0);
      input.emplace(piece.storage().getWeakStorageImpl());
      communicator->all_gather(output, piece, *stream);
    }
    EXPECT_FALSE(input->expired());
    stream->synchronize();
    EXPECT_TRUE(at::equal(output, at::arange(1, 3).to(at::kFloat)));
    communicator->all_reduce(at::ones({1}), *stream);  // lets go of what is done
    EXPECT_TRUE(input->expired());
    world->close(std::chrono::seconds(30));
  });
}

TEST(NcclUse, EventsAreUsedAgain) {
  NcclRanks ranks(2);
  run_ranks(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto stream = world->make_stream(false);
    const auto launch = [&](int times) {
      (void)ranks.cuda(rank).take_counts();
      for (int i = 0; i < times; ++i) communicator->all_reduce(at::ones({1}), *stream);
      stream->synchronize();
      return ranks.cuda(rank).take_counts()["event_create"];
    };
    std::atomic<bool> is_open = false;
    stream->enqueue([&] {  // all of them are under way at once
      while (!is_open) std::this_thread::sleep_for(milliseconds(1));
    });
    std::thread opener([&] {
      std::this_thread::sleep_for(milliseconds(50));
      is_open = true;
    });
    EXPECT_EQ(launch(10), 20);
    opener.join();
    EXPECT_EQ(launch(1), 0);
    EXPECT_EQ(launch(10), 0);
    world->close(std::chrono::seconds(30));
  });
}

TEST(NcclUse, NoMoreOperationsAreUnderWayThanAllowed) {
  for (const int max_in_flight : {1, 2, 0}) {
    NcclRanks ranks(2, /*seed=*/5);
    run_ranks(2, [&](int rank) {
      ranks.options(rank).max_in_flight = max_in_flight;
      const auto world = ranks.make_world(rank);
      std::vector<std::unique_ptr<Communicator>> communicators;
      std::vector<std::unique_ptr<Stream>> streams;
      for (int i = 0; i < 5; ++i) {
        communicators.push_back(
            world->make_communicator(group_of({0, 1}, rank, "group" + std::to_string(i))));
        streams.push_back(world->make_stream(false));
      }
      for (int round = 0; round < 20; ++round) {
        for (size_t i = 0; i < streams.size(); ++i) {
          communicators[i]->all_reduce(at::ones({1}), *streams[i]);
        }
      }
      for (const auto& stream : streams) stream->synchronize();
      world->close(std::chrono::seconds(30));
    });
    for (int rank = 0; rank < 2; ++rank) {
      if (max_in_flight == 0) {
        EXPECT_GT(ranks.nccl(rank).most_under_way(), 2);
      } else {
        EXPECT_LE(ranks.nccl(rank).most_under_way(), max_in_flight);
      }
    }
  }
}

TEST(NcclUse, TensorsOfAnotherDeviceAreRefusedBeforeAnythingIsQueued) {
  NcclRanks ranks(1);
  const auto world = ranks.make_world(0);
  const auto communicator = world->make_communicator(group_of({0}, 0));
  const auto stream = world->make_stream(false);
  const at::Tensor elsewhere = at::empty({1}, at::TensorOptions().device(at::kMeta));
  EXPECT_THROW(communicator->all_reduce(elsewhere, *stream), InvalidArgument);
  EXPECT_EQ(communicator->traffic().calls, 0);
  world->close(std::chrono::seconds(30));
}

TEST(NcclUse, BytesAreCountedAsRings) {
  NcclRanks ranks(4);
  run_ranks(4, [&](int rank) {
    const auto world = ranks.make_world(rank);
    GroupInfo group = group_of({0, 1, 2, 3}, rank);
    group.nodes = {0, 0, 1, 1};
    const auto communicator = world->make_communicator(group);
    const auto stream = world->make_stream(false);
    communicator->reduce_scatter(at::zeros({10}), at::ones({40}), *stream);
    stream->synchronize();
    // All three pieces of 40 bytes go to the next member: of another node for ranks 1 and 3.
    EXPECT_EQ(communicator->traffic().sent_inter_nbytes, rank % 2 == 1 ? 120 : 0);
    EXPECT_EQ(communicator->traffic().received_inter_nbytes, rank % 2 == 0 ? 120 : 0);
    EXPECT_TRUE(communicator->reduces_in_ring() && communicator->gathers_in_ring());
    world->close(std::chrono::seconds(30));
  });
}

TEST(NcclEnd, CloseWaitsForWhatIsUnderWayAndIsIdempotent) {
  NcclRanks ranks(2, /*seed=*/3);
  run_ranks(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const auto stream = world->make_stream(false);
    const at::Tensor tensor = at::ones({2});
    for (int i = 0; i < 20; ++i) communicator->all_reduce(tensor, *stream);
    world->close(std::chrono::seconds(30));
    EXPECT_EQ(tensor[0].item<float>(), 1 << 20);
    world->close(std::chrono::seconds(30));
    EXPECT_THROW(communicator->all_reduce(tensor, *stream), CommError);
  });
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
}

TEST(NcclEnd, AnyOrderOfDestructionFreesEverything) {
  for (const bool world_first : {true, false}) {
    NcclRanks ranks(2);
    run_ranks(2, [&](int rank) {
      auto world = ranks.make_world(rank);
      auto communicator = world->make_communicator(group_of({0, 1}, rank));
      auto stream = world->make_stream(false);
      auto event = stream->make_event();
      communicator->all_reduce(at::ones({1}), *stream);
      stream->record(*event);
      if (world_first) world.reset();
      event.reset();
      stream.reset();
      communicator.reset();
    });
    EXPECT_EQ(ranks.network().num_live_comms, 0);
  }
}

// Threads and communicators do not survive a fork; a sanitizer's run-time may not either.
TEST(NcclEnd, ForkedProcessIsRefused) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "ThreadSanitizer stops a fork of a process with threads";
#else
  NcclRanks ranks(2);
  run_ranks(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    if (rank == 0) {
      const pid_t child = fork();
      if (child == 0) {
        int status = 1;
        try {
          communicator->barrier();
        } catch (const CommError& error) {
          status = has(error.what(), "forked") ? 0 : 2;
        }
        _exit(status);
      }
      int status = -1;
      ASSERT_EQ(waitpid(child, &status, 0), child);
      EXPECT_EQ(WEXITSTATUS(status), 0);
    }
    communicator->barrier();
    world->close(std::chrono::seconds(30));
  });
#endif
}

// --- order ---------------------------------------------------------------------------------------

// A step of a program over a few buffers. Edges are made where two steps share a buffer, and
// nowhere else.
struct ProgramStep {
  size_t lane = 0;    // stream and communicator
  size_t buffer = 0;  // is summed over the ranks
  int from = -1;      // or gets the halves of this buffer of all ranks
};

constexpr size_t kNumLanes = 3;
constexpr size_t kNumBuffers = 3;
constexpr int64_t kNumel = 4;  // of a buffer

std::vector<ProgramStep> make_program(unsigned seed) {
  std::minstd_rand random(seed);
  std::vector<ProgramStep> program(6);
  for (ProgramStep& step : program) {
    step.lane = random() % kNumLanes;
    step.buffer = random() % kNumBuffers;
    const size_t other = random() % kNumBuffers;
    if (random() % 2 == 0 && other != step.buffer) step.from = static_cast<int>(other);
  }
  return program;
}

using Buffers = std::vector<at::Tensor>;

Buffers initial_buffers(unsigned seed, int rank) {
  Buffers buffers;
  for (size_t i = 0; i < kNumBuffers; ++i) {
    const auto start = static_cast<int64_t>(7 * i + seed % 5) + 3 * rank;
    buffers.push_back((at::arange(kNumel) + start).remainder(11).to(at::kFloat));
  }
  return buffers;
}

// What both ranks have when the steps run one after the other.
std::array<Buffers, 2> run_in_order(unsigned seed) {
  std::array<Buffers, 2> of_rank = {initial_buffers(seed, 0), initial_buffers(seed, 1)};
  for (const ProgramStep& step : make_program(seed)) {
    at::Tensor result;
    if (step.from >= 0) {
      const auto from = static_cast<size_t>(step.from);
      result = at::cat({of_rank[0][from].narrow(0, 0, 2), of_rank[1][from].narrow(0, 0, 2)});
    } else {
      result = (of_rank[0][step.buffer] + of_rank[1][step.buffer]).remainder(11);
    }
    for (Buffers& buffers : of_rank) buffers[step.buffer].copy_(result);
  }
  return of_rank;
}

struct Lane {
  std::unique_ptr<Communicator> communicator;
  std::unique_ptr<Stream> stream;
};

Buffers run_on_streams(unsigned seed, int rank, const std::vector<Lane>& lanes, bool drops_edges) {
  Buffers buffers = initial_buffers(seed, rank);
  std::vector<std::unique_ptr<Event>> last_use(kNumBuffers);
  for (const ProgramStep& step : make_program(seed)) {
    const Lane& lane = lanes[step.lane];
    std::vector<size_t> used = {step.buffer};
    if (step.from >= 0) used.push_back(static_cast<size_t>(step.from));
    for (const size_t i : used) {
      if (last_use[i] != nullptr && !drops_edges) lane.stream->wait(*last_use[i]);
    }
    const at::Tensor& buffer = buffers[step.buffer];
    if (step.from >= 0) {
      const at::Tensor half = buffers[static_cast<size_t>(step.from)].narrow(0, 0, 2);
      lane.communicator->all_gather(buffer, half, *lane.stream);
    } else {
      lane.communicator->all_reduce(buffer, *lane.stream);
      lane.stream->enqueue([buffer] { buffer.remainder_(11); });
    }
    for (const size_t i : used) {
      last_use[i] = lane.stream->make_event();
      lane.stream->record(*last_use[i]);
    }
  }
  for (const Lane& lane : lanes) lane.stream->synchronize();
  return buffers;
}

// Of random programs on streams with random delays, how many give something else than in order.
int count_wrong(int num_programs, bool drops_edges) {
  std::array<std::vector<Buffers>, 2> found;
  NcclRanks ranks(2, /*seed=*/11, /*max_delay_us=*/5);
  run_ranks(2, [&](int rank) {
    ranks.options(rank).max_in_flight = 0;
    const auto world = ranks.make_world(rank);
    std::vector<Lane> lanes;
    for (size_t i = 0; i < kNumLanes; ++i) {
      lanes.push_back({world->make_communicator(group_of({0, 1}, rank, "lane" + std::to_string(i))),
                       world->make_stream(false)});
    }
    for (int number = 1; number <= num_programs; ++number) {
      found[static_cast<size_t>(rank)].push_back(
          run_on_streams(static_cast<unsigned>(number), rank, lanes, drops_edges));
    }
    world->close(std::chrono::seconds(30));
  });
  int num_wrong = 0;
  for (int number = 1; number <= num_programs; ++number) {
    const std::array<Buffers, 2> expected = run_in_order(static_cast<unsigned>(number));
    bool is_right = true;
    for (size_t rank = 0; rank < 2; ++rank) {
      const Buffers& buffers = found[rank][static_cast<size_t>(number) - 1];
      for (size_t i = 0; i < kNumBuffers; ++i) {
        is_right = is_right && at::equal(buffers[i], expected[rank][i]);
      }
    }
    num_wrong += is_right ? 0 : 1;
  }
  return num_wrong;
}

TEST(NcclOrder, RandomProgramsOnLateStreamsGiveWhatTheyGiveInOrder) {
  const int num_programs = std::getenv("MICS_WIDE") != nullptr ? 10000 : 1000;
  EXPECT_EQ(count_wrong(num_programs, /*drops_edges=*/false), 0);
}

TEST(NcclOrder, MissingEdgesShow) {
#if defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the race that is made on purpose would be reported";
#else
  EXPECT_GT(count_wrong(200, /*drops_edges=*/true), 0);
#endif
}

// --- the real libraries --------------------------------------------------------------------------

TEST(NcclLibraries, AreLoadedAndTheirVersionsRead) {
  const NcclVersions versions = nccl_versions();
  EXPECT_EQ(versions.header, NCCL_VERSION_CODE);
  if (versions.library == 0) GTEST_SKIP() << "no NCCL on this host: " << versions.problem;
  EXPECT_GE(versions.library, 21800);
  if (versions.num_devices > 0) {
    EXPECT_EQ(versions.problem, "");
    return;
  }
  EXPECT_NE(versions.problem, "");
  // Asked for without a GPU: says so, and not later.
  try {
    (void)NcclWorld::create(c10::make_intrusive<c10d::HashStore>(), NcclOptions());
    FAIL() << "a world without a GPU was made";
  } catch (const InvalidArgument& error) {
    EXPECT_TRUE(has(error.what(), "NCCL needs a GPU")) << error.what();
  }
}

TEST(NcclLibraries, IdsAreMadeWithoutAGpu) {
  std::shared_ptr<NcclApi> nccl;
  try {
    nccl = load_nccl();
  } catch (const Error& error) {
    GTEST_SKIP() << error.what();
  }
  ncclUniqueId first;
  ncclUniqueId second;
  ASSERT_EQ(nccl->get_unique_id(&first), ncclSuccess);
  ASSERT_EQ(nccl->get_unique_id(&second), ncclSuccess);
  EXPECT_NE(std::memcmp(&first, &second, sizeof(first)), 0);
}

}  // namespace
}  // namespace mics
