// Shared memory against the local backend, bit for bit; ranks are threads with a mapping each.
#include "mics/shm_communicator.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "mics/error.h"
#include "mics/local_world.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::run_ranks;

GroupInfo group_of(int size, int rank) {
  GroupInfo group{"test", {}, {}, rank};
  for (int member = 0; member < size; ++member) {
    group.world_ranks.push_back(member);
    group.nodes.push_back(0);
  }
  return group;
}

ShmOptions options_of(const std::string& name, int size, int rank, int timeout_ms = 20000) {
  return {name, rank == 0, int64_t{128} * size * 4, std::chrono::milliseconds(timeout_ms)};
}

TEST(ShmCommunicator, EqualsTheLocalBackendBitwiseInManyRounds) {
  for (const int size : {2, 3, 4}) {
    LocalWorld world(size, std::chrono::seconds(20));
    const std::string name = make_shm_segment_name();
    run_ranks(size, [&](int rank) {
      const auto local = world.make_communicator(group_of(size, rank));
      const auto shm = make_shm_communicator(group_of(size, rank), options_of(name, size, rank));
      const auto stream = make_inline_stream();
      for (const auto dtype : {at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}) {
        for (const int64_t numel : {1, 5, 4097}) {
          const at::Tensor whole = (at::arange(size * numel) * 0.37 + rank).sin().to(dtype);
          const at::Tensor piece = whole.narrow(0, 0, numel).clone();
          const auto both = [&](const auto& run) {
            const at::Tensor expected = run(*local);
            ASSERT_TRUE(at::equal(run(*shm), expected));
          };
          both([&](Communicator& c) {
            at::Tensor out = at::empty_like(whole);
            c.all_gather({{out, piece}, {at::empty({0}, out.options()), piece.narrow(0, 0, 0)}},
                         *stream);
            return out;
          });
          both([&](Communicator& c) {
            at::Tensor input = whole.clone();
            at::Tensor out = input.narrow(0, rank * numel, numel);
            c.reduce_scatter(out, input, *stream);
            return out;
          });
          both([&](Communicator& c) {
            at::Tensor out = piece.clone();
            c.all_reduce(out, *stream);
            return out;
          });
        }
      }
      shm->barrier();
    });
  }
}

TEST(ShmCommunicator, DifferentSizesAreAnErrorOnEveryMember) {
  const std::string name = make_shm_segment_name();
  std::atomic<int> num_errors = 0;
  run_ranks(3, [&](int rank) {
    const auto shm = make_shm_communicator(group_of(3, rank), options_of(name, 3, rank));
    shm->barrier();  // all have attached
    try {
      shm->all_reduce(at::ones({rank == 1 ? 5 : 4}), *make_inline_stream());
    } catch (const CommError&) {
      ++num_errors;
    }
  });
  EXPECT_EQ(num_errors, 3);
}

TEST(ShmCommunicator, MissingMemberIsATimeout) {
  const auto shm =
      make_shm_communicator(group_of(2, 0), options_of(make_shm_segment_name(), 2, 0, 200));
  EXPECT_THROW(shm->barrier(), TimeoutError);
}

}  // namespace
}  // namespace mics
