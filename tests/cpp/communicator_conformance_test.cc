// The promises of communicator.h on the backends that C++ can make alone: local, shared memory, and
// NCCL's over the fakes. tests/python/test_communicators.py checks the same promises over Gloo,
// between processes.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <tuple>

#include "mics/communicator.h"
#include "mics/error.h"
#include "mics/local_world.h"
#include "mics/shm_communicator.h"
#include "support/multi_rank.h"
#ifdef MICS_WITH_NCCL
#include "support/nccl_ranks.h"
#endif

namespace mics {
namespace {

using testing::run_ranks;

GroupInfo world_group(int size, int rank, int ranks_per_node = 8) {
  GroupInfo group{"test", {}, {}, rank};
  for (int member = 0; member < size; ++member) {
    group.world_ranks.push_back(member);
    group.nodes.push_back(member / ranks_per_node);
  }
  return group;
}

// Different for every rank and element; small integers, so sums are exact in every dtype.
at::Tensor values(int rank, int64_t numel, at::ScalarType dtype) {
  return (at::arange(numel, at::kLong) * 7 + rank * 3).remainder(11).to(dtype);
}

class Conformance
    : public ::testing::TestWithParam<std::tuple<int, at::ScalarType, int64_t, bool>> {
 protected:
  int size() const { return std::get<0>(GetParam()); }
  at::ScalarType dtype() const { return std::get<1>(GetParam()); }
  int64_t numel() const { return std::get<2>(GetParam()); }
  bool in_place() const { return std::get<3>(GetParam()); }

  // Runs `body` on every backend that C++ can make alone, on both kinds of stream.
  void on_ranks(const std::function<void(int, Communicator&, Stream&)>& body) const {
    for (const bool is_shm : {false, true}) {
      if (is_shm && size() == 1) continue;  // a group of one has no segment
      SCOPED_TRACE(is_shm ? "shm" : "local");
      LocalWorld world(size(), std::chrono::seconds(60));
      const std::string segment = make_shm_segment_name();
      run_ranks(size(), [&](int rank) {
        const GroupInfo group = world_group(size(), rank);
        // Slots so small that most messages take several rounds.
        const auto communicator =
            is_shm ? ShmGroup(group,
                              {segment, rank == 0, int64_t{128} * size(), std::chrono::seconds(60)})
                         .make_communicator()
                   : world.make_communicator(group);
        const auto inline_stream = make_inline_stream();
        body(rank, *communicator, *inline_stream);
        const auto worker_stream = make_worker_stream();
        body(rank, *communicator, *worker_stream);
      });
    }
#ifdef MICS_WITH_NCCL
    SCOPED_TRACE("nccl");
    testing::NcclRanks ranks(size());
    run_ranks(size(), [&](int rank) {
      const auto world = ranks.make_world(rank);
      const auto communicator = world->make_communicator(world_group(size(), rank));
      const auto stream = world->make_stream(/*high_priority=*/true);
      body(rank, *communicator, *stream);
      world->close(std::chrono::seconds(30));
    });
    ASSERT_EQ(ranks.network().faults(), std::vector<std::string>());
    ASSERT_EQ(ranks.network().num_live_comms, 0);
#endif
  }
};

TEST_P(Conformance, AllGatherIsBitwiseInRankOrder) {
  on_ranks([&](int rank, Communicator& communicator, Stream& stream) {
    at::Tensor output = at::full({size() * numel()}, -1, at::TensorOptions().dtype(dtype()));
    at::Tensor input = values(rank, numel(), dtype());
    if (in_place()) {
      output.narrow(0, rank * numel(), numel()).copy_(input);
      input = output.narrow(0, rank * numel(), numel());
    }
    communicator.all_gather(output, input, stream);
    stream.synchronize();
    for (int member = 0; member < size(); ++member) {
      ASSERT_TRUE(
          at::equal(output.narrow(0, member * numel(), numel()), values(member, numel(), dtype())));
    }
  });
}

TEST_P(Conformance, ReduceScatterLeavesTheSumOfPieceR) {
  at::Tensor expected = at::zeros({size() * numel()}, at::kDouble);
  for (int rank = 0; rank < size(); ++rank) expected += values(rank, size() * numel(), at::kDouble);
  on_ranks([&](int rank, Communicator& communicator, Stream& stream) {
    const at::Tensor input = values(rank, size() * numel(), dtype());
    const at::Tensor output = in_place() ? input.narrow(0, rank * numel(), numel())
                                         : at::empty({numel()}, input.options());
    communicator.reduce_scatter(output, input, stream);
    stream.synchronize();
    ASSERT_TRUE(at::equal(output.to(at::kDouble), expected.narrow(0, rank * numel(), numel())));
  });
}

TEST_P(Conformance, AllReduceIsTheSumOnEveryRank) {
  at::Tensor expected = at::zeros({numel()}, at::kDouble);
  for (int rank = 0; rank < size(); ++rank) expected += values(rank, numel(), at::kDouble);
  on_ranks([&](int rank, Communicator& communicator, Stream& stream) {
    const at::Tensor tensor = values(rank, numel(), dtype());
    communicator.all_reduce(tensor, stream);
    stream.synchronize();
    ASSERT_TRUE(at::equal(tensor.to(at::kDouble), expected));
  });
}

TEST_P(Conformance, GroupedOperationsEqualSingleOnes) {
  on_ranks([&](int rank, Communicator& communicator, Stream& stream) {
    std::vector<TensorPair> gathers;
    std::vector<TensorPair> reductions;
    for (const int64_t n : {numel(), int64_t{0}, numel() + 3}) {
      gathers.push_back(
          {at::empty({size() * n}, at::TensorOptions().dtype(dtype())), values(rank, n, dtype())});
      reductions.push_back(
          {at::empty({n}, at::TensorOptions().dtype(dtype())), values(rank, size() * n, dtype())});
    }
    communicator.all_gather(gathers, stream);
    stream.synchronize();
    communicator.reduce_scatter(reductions, stream);
    stream.synchronize();
    for (const TensorPair& pair : gathers) {
      const at::Tensor single = at::empty_like(pair.output);
      communicator.all_gather(single, pair.input, stream);
      stream.synchronize();
      ASSERT_TRUE(at::equal(single, pair.output));
    }
    for (const TensorPair& pair : reductions) {
      const at::Tensor single = at::empty_like(pair.output);
      communicator.reduce_scatter(single, pair.input, stream);
      stream.synchronize();
      ASSERT_TRUE(at::equal(single, pair.output));
    }
  });
}

INSTANTIATE_TEST_SUITE_P(
    Local, Conformance,
    ::testing::Combine(::testing::Range(1, 9),
                       ::testing::Values(at::kFloat, at::kBFloat16, at::kHalf),
                       ::testing::Values(int64_t{1}, int64_t{5}, int64_t{4097}), ::testing::Bool()),
    [](const auto& info) {
      return "local_" + std::to_string(std::get<0>(info.param)) + "ranks_" +
             std::string(c10::toString(std::get<1>(info.param))) + "_" +
             std::to_string(std::get<2>(info.param)) + (std::get<3>(info.param) ? "_inplace" : "");
    });

TEST(Communicator, SumsSeveralMegabytes) {
  constexpr int kSize = 4;
  constexpr int64_t kNumel = 1 << 20;
  LocalWorld world(kSize, std::chrono::seconds(60));
  run_ranks(kSize, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(kSize, rank));
    const at::Tensor tensor = at::full({kNumel}, rank + 1.0);
    communicator->all_reduce(tensor, *make_inline_stream());
    ASSERT_TRUE(at::equal(tensor, at::full({kNumel}, 10.0)));
  });
}

// 1 + 2^-24 twice: in fp32 and in rank order both small terms are lost; another order, or a wider
// sum, gives another result.
TEST(Communicator, SumsInRankOrderInFp32) {
  const std::vector<float> terms = {1.0F, 0x1p-24F, 0x1p-24F};
  LocalWorld world(3, std::chrono::seconds(60));
  run_ranks(3, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(3, rank));
    const at::Tensor tensor = at::full({1}, terms[static_cast<size_t>(rank)]);
    communicator->all_reduce(tensor, *make_inline_stream());
    ASSERT_EQ(tensor.item<float>(), 1.0F);
  });
}

// In bf16 256 + 1 is 256: a sum rounded at each step would stay there.
TEST(Communicator, RoundsNarrowDtypesOnce) {
  LocalWorld world(4, std::chrono::seconds(60));
  run_ranks(4, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(4, rank));
    const at::Tensor tensor = at::full({1}, rank == 0 ? 256.0 : 1.0, at::kBFloat16);
    communicator->all_reduce(tensor, *make_inline_stream());
    ASSERT_EQ(tensor.to(at::kFloat).item<float>(), 260.0F);  // 259 rounded to bf16
  });
}

TEST(Communicator, CountsBytesByNode) {
  LocalWorld world(4, std::chrono::seconds(60));
  run_ranks(4, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(4, rank, /*ranks_per_node=*/2));
    const auto stream = make_inline_stream();
    communicator->all_gather(at::empty({40}), at::ones({10}), *stream);
    ASSERT_EQ(communicator->traffic().received_intra_nbytes, 40);
    ASSERT_EQ(communicator->traffic().received_inter_nbytes, 80);
    communicator->reduce_scatter(at::empty({10}), at::ones({40}), *stream);
    ASSERT_EQ(communicator->traffic().sent_inter_nbytes, 160);
    ASSERT_EQ(communicator->traffic().calls, 2);
  });
}

TEST(Communicator, RefusesBadArgumentsBeforeAnythingIsQueued) {
  LocalWorld world(1, std::chrono::seconds(60));
  const auto communicator = world.make_communicator(world_group(1, 0));
  const auto stream = make_inline_stream();
  const at::Tensor ones = at::ones({4});
  EXPECT_THROW(communicator->all_gather(at::empty({3}), ones, *stream), InvalidArgument);
  EXPECT_THROW(communicator->all_gather(at::empty({4}, at::kHalf), ones, *stream), InvalidArgument);
  EXPECT_THROW(communicator->all_gather(at::empty({2, 4}).t(), at::ones({8}), *stream),
               InvalidArgument);
  EXPECT_THROW(communicator->all_gather(std::vector<TensorPair>{}, *stream), InvalidArgument);
  EXPECT_THROW(communicator->reduce_scatter(ones.narrow(0, 1, 2), ones.narrow(0, 0, 2), *stream),
               InvalidArgument);
  EXPECT_THROW(communicator->all_reduce(at::ones({4}, at::kBool), *stream), InvalidArgument);
  EXPECT_EQ(communicator->traffic().calls, 0);
}

TEST(Communicator, MissingMemberIsATimeoutOnTheOthers) {
  LocalWorld world(3, std::chrono::seconds(2));
  std::atomic<int> num_errors = 0;
  run_ranks(3, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(3, rank));
    if (rank == 2) return;
    try {
      communicator->all_reduce(at::ones({1}), *make_inline_stream());
    } catch (const TimeoutError& error) {
      EXPECT_NE(std::string(error.what()).find("2 of 3 members"), std::string::npos);
      ++num_errors;
    } catch (const CommError&) {
      ++num_errors;
    }
  });
  EXPECT_EQ(num_errors, 2);
}

TEST(Communicator, DifferentSizesAreAnErrorOnEveryMember) {
  LocalWorld world(3, std::chrono::seconds(60));
  std::atomic<int> num_errors = 0;
  run_ranks(3, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(3, rank));
    try {
      communicator->all_reduce(at::ones({rank == 1 ? 5 : 4}), *make_inline_stream());
    } catch (const CommError&) {
      ++num_errors;
    }
  });
  EXPECT_EQ(num_errors, 3);
}

TEST(Communicator, DifferentOperationsAreAnErrorOnEveryMember) {
  LocalWorld world(3, std::chrono::seconds(60));
  std::atomic<int> num_errors = 0;
  run_ranks(3, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(3, rank));
    const auto stream = make_inline_stream();
    try {
      if (rank == 0) communicator->barrier();
      if (rank == 1) communicator->all_gather(at::ones({12}), at::ones({4}), *stream);
      if (rank == 2) communicator->all_reduce(at::ones({4}), *stream);
    } catch (const CommError&) {
      ++num_errors;
    }
  });
  EXPECT_EQ(num_errors, 3);
}

// The tensors of a call are its own: those of the member that finds the difference first go while
// the others still look at theirs.
TEST(Communicator, AMemberThatRefusesStaysUntilTheOthersHaveRead) {
  LocalWorld world(4, std::chrono::seconds(60));
  std::atomic<int> num_errors = 0;
  constexpr int kNumRounds = 100;
  run_ranks(4, [&](int rank) {
    const auto communicator = world.make_communicator(world_group(4, rank));
    for (int round = 0; round < kNumRounds; ++round) {
      std::vector<TensorPair> pairs;
      for (int i = 0; i < 500; ++i) pairs.push_back({at::ones({4}), at::ones({1})});
      // Rank 3 sees it at the first pair, the others at the last, after all pairs of ranks before.
      if (rank == 3) pairs.front() = {at::ones({8}), at::ones({2})};
      try {
        communicator->all_gather(pairs, *make_inline_stream());
      } catch (const CommError&) {
        ++num_errors;
      }
    }
  });
  EXPECT_EQ(num_errors, 4 * kNumRounds);
}

}  // namespace
}  // namespace mics
