// The NCCL backend over fakes: how a world starts, is used and ends. What it computes is checked
// with the other backends in communicator_conformance_test.cc.
#include "mics/nccl_world.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <thread>

#include "mics/error.h"
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
  const auto network = std::make_shared<testing::ThreadNetwork>();
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
  for (int rank = 0; rank < 3; ++rank) ranks.options(rank).init_timeout = milliseconds(3000);
  auto errors = errors_of(3, [&](int rank) {
    if (rank != 2) (void)ranks.make_world(rank);
  });
  EXPECT_TRUE(has(errors[0], "no answer from world ranks [2]")) << errors[0];

  NcclRanks others(3);
  for (int rank = 0; rank < 3; ++rank) others.options(rank).init_timeout = milliseconds(3000);
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
      ranks.options(rank).init_timeout = milliseconds(stalls ? 3000 : 600000);
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
  EXPECT_TRUE(has(errors[0], "ncclCommInitRankConfig failed: result 1 (group gather/intra [0]"))
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

// A member's letting go ends nothing: the others may still split theirs.
TEST(NcclStart, SplitMayBeFromACommunicatorThatAMemberHasLetGoOf) {
  NcclRanks ranks(2);
  const auto errors = errors_of(2, [&](int rank) {
    ranks.options(rank).is_blocking = false;  // a mismatch must not hang
    ranks.options(rank).init_timeout = milliseconds(60000);
    const auto world = ranks.make_world(rank);
    auto first = world->make_communicator(group_of({0, 1}, rank, "gather/intra"));
    if (rank == 0) first.reset();
    const auto second = world->make_communicator(group_of({0, 1}, rank, "reduce/intra"));
    const at::Tensor tensor = at::ones({1});
    const auto stream = world->make_stream(false);
    second->all_reduce(tensor, *stream);
    stream->synchronize();
    EXPECT_EQ(tensor.item<float>(), 2.0F);
    EXPECT_EQ(ranks.nccl(rank).take_counts()["comm_split"], 1);
    first.reset();
    world->close(std::chrono::seconds(30));
  });
  EXPECT_EQ(errors, std::vector<std::string>(2));
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
    std::atomic<bool> is_open = false;
    const auto launch = [&](int times) {
      (void)ranks.cuda(rank).take_counts();
      for (int i = 0; i < times; ++i) communicator->all_reduce(at::ones({1}), *stream);
      is_open = true;
      stream->synchronize();
      return ranks.cuda(rank).take_counts()["event_create"];
    };
    stream->enqueue([&] {  // all of them are under way at once
      while (!is_open) std::this_thread::sleep_for(milliseconds(1));
    });
    EXPECT_EQ(launch(10), 20);
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
      // Without a limit rank 0's wait for rank 1, so that they are under way together.
      while (max_in_flight == 0 && rank == 1 && ranks.nccl(0).most_under_way() <= 2) {
        std::this_thread::sleep_for(milliseconds(1));
      }
      for (int round = 0; round < 20; ++round) {
        for (size_t i = 0; i < streams.size(); ++i) {
          communicators[i]->all_reduce(at::ones({1}), *streams[i]);
        }
      }
      for (const auto& stream : streams) stream->synchronize();
      world->close(std::chrono::seconds(30));
    });
    if (max_in_flight == 0) continue;
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_LE(ranks.nccl(rank).most_under_way(), max_in_flight);
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

// As communicator.h says of it. In bf16 256 + 1 is 256; in fp16 80000 is infinite.
TEST(NcclUse, SumsAreRoundedToTheDtypeOfTheWireAtEachAddition) {
  NcclRanks ranks(4);
  run_ranks(4, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1, 2, 3}, rank));
    EXPECT_TRUE(communicator->sums_in_wire_dtype());
    const auto stream = world->make_stream(false);
    const at::Tensor bf16 = at::full({1}, rank == 0 ? 256.0 : 1.0, at::kBFloat16);
    communicator->all_reduce(bf16, *stream);
    const at::Tensor fp16 = at::full({1}, rank < 2 ? 40000.0 : -20000.0, at::kHalf);
    communicator->all_reduce(fp16, *stream);
    stream->synchronize();
    EXPECT_EQ(bf16.to(at::kFloat).item<float>(), 256.0F);
    EXPECT_TRUE(at::isinf(fp16).item<bool>());  // though the sum is 40000
    world->close(std::chrono::seconds(30));
  });
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
      if (world_first) world.reset();  // which does not end its communicators
      const at::Tensor tensor = at::ones({1});
      communicator->all_reduce(tensor, *stream);
      stream->record(*event);
      event->synchronize();
      EXPECT_EQ(tensor.item<float>(), 2.0F);
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
