// Memory that NCCL has registered: what is called when, that training gives the same bits, and what
// is said when it cannot be had.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "mics/error.h"
#include "runtime/runtime_memory.h"
#include "support/nccl_training.h"

namespace mics {
namespace {

using testing::Case;
using testing::errors_of;
using testing::expect_bitwise_equal;
using testing::FakeCuda;
using testing::group_of;
using testing::has;
using testing::kMicroSteps;
using testing::kNumLayers;
using testing::NcclRanks;
using testing::PoisonedMemory;
using testing::Rank;
using testing::run_ranks;
using testing::train;
using testing::train_locally;
using testing::train_over_nccl;

constexpr auto kBuffers = NcclRegistration::kBuffers;
constexpr auto kWindows = NcclRegistration::kWindows;

const Case kTwoHops{"", {2, 2, 4, true}, {}};

void ask(NcclRanks& ranks, int size, NcclRegistration registration, bool copy_engine = false) {
  for (int rank = 0; rank < size; ++rank) {
    ranks.options(rank).registration = registration;
    ranks.options(rank).copy_engine = copy_engine;
  }
}

int take(std::map<std::string, int>& counts, const std::string& name) {
  const auto found = counts.extract(name);
  return found.empty() ? 0 : found.mapped();
}

TEST(PoisonedMemory, HoldsNoNumbers) {
  const PoisonedMemory poisoned;
  EXPECT_TRUE(at::empty({3}).isnan().all().item<bool>());
  EXPECT_TRUE(at::empty({3}, at::kBFloat16).isnan().all().item<bool>());
  EXPECT_TRUE((at::empty({3}, at::kLong) == -1).all().item<bool>());
}

TEST(FakeCuda, CopyFromMemoryThatIsNotPinnedIsASynchronisation) {
  NcclRanks ranks(1);
  FakeCuda& cuda = ranks.cuda(0);
  for (const bool is_pinned : {true, false}) {
    const at::Tensor from = is_pinned ? cuda.allocate_pinned(8) : at::empty({8}, at::kByte);
    from.fill_(7);
    const at::Tensor to = at::zeros({8}, at::kByte);
    cuda.copy_from_host(to, from, nullptr, 0);
    EXPECT_TRUE(at::equal(to, from));
    EXPECT_EQ(cuda.take_counts()["synchronisation"], is_pinned ? 0 : 1);
  }
}

TEST(NcclMemory, TrainingInRegisteredMemoryGivesTheSameBits) {
  for (const Case& what :
       {kTwoHops, Case{"", {1, 4, 4, false}, {}}, Case{"", {2, 2, 2, false}, {}},
        Case{"", {4, 1, 4, true}, {}},  // nothing but rails
        Case{"", {2, 2, 4, true}, {Residency::kBlock, Residency::kBlock, Residency::kBlock}}}) {
    const auto expected = train_locally(what, 2);
    for (const NcclRegistration registration : {kBuffers, kWindows}) {
      for (const unsigned seed : {0U, 1U, 2U}) {
        NcclRanks ranks(what.world.size(), seed);
        ask(ranks, what.world.size(), registration, registration == kWindows);
        expect_bitwise_equal(train_over_nccl(ranks, what, 2), expected);
      }
    }
  }
}

// All in the first step: one allocation, one registration of each of four communicators.
TEST(NcclMemory, IsMadeAndRegisteredOnce) {
  for (const NcclRegistration registration : {kBuffers, kWindows}) {
    const char* call = registration == kWindows ? "comm_window_register" : "comm_register";
    NcclRanks ranks(4);
    ask(ranks, 4, registration);
    run_ranks(4, [&](int rank) {
      Rank one(ranks, kTwoHops, rank);
      train(one.model(), rank, 1);
      auto first = ranks.nccl(rank).take_counts();
      EXPECT_EQ(take(first, "mem_alloc"), 1);
      EXPECT_EQ(take(first, call), 4);
      train(one.model(), rank, 2);
      auto later = ranks.nccl(rank).take_counts();
      EXPECT_EQ(take(later, "mem_alloc"), 0);
      EXPECT_EQ(take(later, call), 0);
    });
    EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
  }
}

// NCCL 2.28 takes copy engines where both ends are in windows: hop 2, from block to full
// parameters. Reductions have a communicator of their own, which keeps its thread blocks.
TEST(NcclMemory, GathersInsideANodeGoToCopyEngines) {
  for (const bool copy_engine : {false, true}) {
    NcclRanks ranks(4);
    ask(ranks, 4, kWindows, copy_engine);
    run_ranks(4, [&](int rank) {
      Rank one(ranks, kTwoHops, rank);
      train(one.model(), rank, 1);
      (void)ranks.nccl(rank).take_counts();
      train(one.model(), rank, 1);
      auto counts = ranks.nccl(rank).take_counts();
      const int gathers = 2 * kMicroSteps * kNumLayers;
      EXPECT_EQ(take(counts, "by a copy engine"), copy_engine ? 2 * gathers : 0);  // two pieces
      // Both hops of gathers, and hop 1 of reductions into a block; hop 2 adds to the shard.
      EXPECT_GE(take(counts, "into a window"), 3 * gathers);
    });
  }
}

TEST(NcclMemory, AnotherPlanIsRegisteredAnew) {
  NcclRanks ranks(4);
  ask(ranks, 4, kWindows);
  run_ranks(4, [&](int rank) {
    Rank one(ranks, kTwoHops, rank);
    train(one.model(), rank, 1);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      one.model().unit(layer).settings().residency = {Residency::kFull, Residency::kFull,
                                                      Residency::kShard};
    }
    (void)ranks.nccl(rank).take_counts();
    train(one.model(), rank, 1);
    auto counts = ranks.nccl(rank).take_counts();
    EXPECT_EQ(take(counts, "mem_alloc"), 1);
    EXPECT_EQ(take(counts, "comm_window_deregister"), 4);
    EXPECT_EQ(take(counts, "comm_window_register"), 4);
    one.model().engine().release_memory();
    EXPECT_EQ(ranks.nccl(rank).num_held(), 0);
    train(one.model(), rank, 1);
    one.model().engine().reset();  // as after an exception
    EXPECT_EQ(ranks.nccl(rank).num_held(), 0);
  });
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
}

// One rank's report must not wait for the others.
TEST(NcclMemory, AReportRegistersNothing) {
  NcclRanks ranks(4);
  ask(ranks, 4, kWindows);
  run_ranks(4, [&](int rank) {
    Rank one(ranks, kTwoHops, rank);
    if (rank == 1) {
      EXPECT_GT(one.model().engine().memory().nbytes(), 0);
    }
    auto counts = ranks.nccl(rank).take_counts();
    EXPECT_EQ(take(counts, "comm_window_register"), 0);
    train(one.model(), rank, 1);
  });
  EXPECT_EQ(ranks.network().faults(), std::vector<std::string>());
}

TEST(NcclMemory, NothingIsRegisteredUnlessAskedFor) {
  NcclRanks ranks(4);
  run_ranks(4, [&](int rank) {
    Rank one(ranks, kTwoHops, rank);
    train(one.model(), rank, 1);
    auto counts = ranks.nccl(rank).take_counts();
    for (const char* call : {"mem_alloc", "comm_register", "comm_window_register"}) {
      EXPECT_EQ(take(counts, call), 0) << call;
    }
  });
}

// Trains, and gives rank 0's notes that hold `part`.
std::vector<std::string> notes_with(NcclRanks& ranks, const std::string& part) {
  std::vector<std::string> found;
  const auto expected = train_locally(kTwoHops, 1);
  const PoisonedMemory poisoned;
  run_ranks(4, [&](int rank) {
    Rank one(ranks, kTwoHops, rank);
    const auto gradients = train(one.model(), rank, 1);
    for (size_t i = 0; i < gradients.size(); ++i) {
      EXPECT_TRUE(at::equal(gradients[i], expected[static_cast<size_t>(rank)][i]));
    }
    if (rank != 0) return;
    for (const std::string& note : one.world().notes()) {
      if (has(note, part)) found.push_back(note);
    }
  });
  return found;
}

TEST(NcclMemory, WhatIsAskedForAndNotObtainedIsNoted) {
  NcclRanks old_library(4);
  ask(old_library, 4, kWindows);
  for (int rank = 0; rank < 4; ++rank) old_library.nccl(rank).set_has_windows(false);
  EXPECT_EQ(notes_with(old_library, "needs a newer NCCL (2.28.7 for windows)").size(), 1U);

  NcclRanks older_library(4);
  ask(older_library, 4, kBuffers);
  for (int rank = 0; rank < 4; ++rank) older_library.nccl(rank).set_has_registration(false);
  EXPECT_EQ(notes_with(older_library, "needs a newer NCCL (2.19)").size(), 1U);

  NcclRanks no_windows(4);
  ask(no_windows, 4, kWindows);
  for (int rank = 0; rank < 4; ++rank) no_windows.nccl(rank).refuse_windows();
  const auto notes = notes_with(no_windows, "NCCL gave no window for ");
  ASSERT_EQ(notes.size(), 4U);
  EXPECT_TRUE(has(notes[0], "gather/rail [0 2]")) << notes[0];

  NcclRanks obtained(4);
  ask(obtained, 4, kWindows);
  EXPECT_EQ(notes_with(obtained, "window").size(), 0U);
}

TEST(NcclMemory, LaunchOrderIsNotedWhereTheLibraryKnowsIt) {
  for (const int version : {22600, 22502}) {
    NcclRanks ranks(4);
    for (int rank = 0; rank < 4; ++rank) ranks.nccl(rank).set_version(version);
    EXPECT_EQ(notes_with(ranks, "NCCL_LAUNCH_ORDER_IMPLICIT is not 1").size(),
              version == 22600 ? 1U : 0U);
  }
}

TEST(NcclMemory, OptionsThatDifferAreNamedOnEveryRank) {
  NcclRanks ranks(3);
  ranks.options(2).registration = kBuffers;
  for (const std::string& error : errors_of(3, [&](int rank) { (void)ranks.make_world(rank); })) {
    EXPECT_TRUE(has(error,
                    "registration=buffers copy_engine=0 max_in_flight=4 max_ctas=0 "
                    "blocking=1 on world_rank 2"))
        << error;
  }
}

TEST(NcclMemory, CopyEnginesWithoutWindowsAreRefused) {
  NcclRanks ranks(2);
  ask(ranks, 2, kBuffers, /*copy_engine=*/true);
  for (const std::string& error : errors_of(2, [&](int rank) { (void)ranks.make_world(rank); })) {
    EXPECT_TRUE(has(error, "copy engines need windows")) << error;
  }
}

// One rank's failure reaches all, as the others may wait for it.
TEST(NcclMemory, AFailureEndsTheWorldOnEveryRank) {
  NcclRanks ranks(2);
  ask(ranks, 2, kWindows);
  ranks.nccl(1).fail("comm_window_register", ncclUnhandledCudaError);
  const auto errors = errors_of(2, [&](int rank) {
    const auto world = ranks.make_world(rank);
    const auto communicator = world->make_communicator(group_of({0, 1}, rank));
    const at::Tensor memory = communicator->allocate(4096);
    const auto stream = world->make_stream(false);
    const auto registration = communicator->register_memory(memory);
    communicator->all_reduce(memory.view(at::kFloat), *stream);
    stream->synchronize();
  });
  EXPECT_TRUE(has(errors[1], "ncclCommWindowRegister failed: result 1")) << errors[1];
  EXPECT_TRUE(has(errors[0], "world_rank 1") || has(errors[0], "rank 1")) << errors[0];
}

// NCCL's own thread writes what is registered, later.
TEST(NcclMemory, NonBlockingRegistrationEndsOrIsGivenUpInTime) {
  for (const bool is_alone : {false, true}) {
    NcclRanks ranks(2);
    ask(ranks, 2, kWindows);
    for (int rank = 0; rank < 2; ++rank) {
      ranks.options(rank).is_blocking = false;
      ranks.options(rank).init_timeout = std::chrono::milliseconds(is_alone ? 3000 : 600000);
    }
    const auto errors = errors_of(2, [&](int rank) {
      const auto world = ranks.make_world(rank);
      const auto communicator = world->make_communicator(group_of({0, 1}, rank));
      const at::Tensor memory = communicator->allocate(4096);
      const auto stream = world->make_stream(false);
      std::shared_ptr<void> registration;
      if (rank == 0 || !is_alone) registration = communicator->register_memory(memory);
      communicator->all_reduce(memory.view(at::kFloat).zero_(), *stream);
      stream->synchronize();
      EXPECT_NE(registration, nullptr);
      registration.reset();
      world->close(std::chrono::seconds(30));
    });
    EXPECT_EQ(has(errors[0], "ncclCommWindowRegister must end in time"), is_alone) << errors[0];
    EXPECT_EQ(errors[1].empty(), !is_alone) << errors[1];
    EXPECT_EQ(ranks.network().num_live_comms, 0);
  }
}

TEST(NcclMemory, NoMemoryIsAnError) {
  NcclRanks ranks(1);
  ask(ranks, 1, kBuffers);
  ranks.nccl(0).fail("mem_alloc", ncclUnhandledCudaError);
  const auto errors = errors_of(1, [&](int rank) {
    const auto world = ranks.make_world(rank);
    (void)world->make_communicator(group_of({0}, rank))->allocate(4096);
  });
  EXPECT_TRUE(has(errors[0], "ncclMemAlloc failed: result 1")) << errors[0];
}

}  // namespace
}  // namespace mics
