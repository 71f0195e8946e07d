// Shared memory against the local backend, bit for bit, with ranks as threads that have a mapping
// each; and its failures, with peers in processes of their own.
#include "mics/shm_communicator.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

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

ShmOptions options_of(const std::string& name, int size, int rank, int timeout_ms = 60000) {
  return {name, rank == 0, int64_t{128} * size * 4, std::chrono::milliseconds(timeout_ms)};
}

std::unique_ptr<Communicator> make_shm_communicator(GroupInfo group, const ShmOptions& options) {
  return ShmGroup(std::move(group), options).make_communicator();
}

TEST(ShmCommunicator, EqualsTheLocalBackendBitwiseInManyRounds) {
  for (const int size : {2, 3, 4}) {
    LocalWorld world(size, std::chrono::seconds(60));
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

TEST(ShmCommunicator, CommunicatorsOfOneGroupShareItsRoundsAndCountAlone) {
  const std::string name = make_shm_segment_name();
  run_ranks(2, [&](int rank) {
    auto group = std::make_unique<ShmGroup>(group_of(2, rank), options_of(name, 2, rank));
    const auto first = group->make_communicator();
    const auto second = group->make_communicator();
    group.reset();
    const auto stream = make_inline_stream();
    for (Communicator* communicator : {first.get(), second.get(), first.get()}) {
      at::Tensor tensor = at::full({3000}, static_cast<float>(rank + 1));
      communicator->all_reduce(tensor, *stream);
      EXPECT_TRUE(at::equal(tensor, at::full({3000}, 3.0F)));
    }
    EXPECT_EQ(first->traffic().calls, 2);
    EXPECT_EQ(second->traffic().calls, 1);
  });
}

TEST(ShmCommunicator, AMemberThatLeftIsNamedAndTheGroupSaysThatItHasFailed) {
  const std::string name = make_shm_segment_name();
  const ShmGroup group(group_of(2, 0), options_of(name, 2, 0));
  {
    const ShmGroup other(group_of(2, 1), options_of(name, 2, 1));
  }
  EXPECT_FALSE(group.has_failed());
  try {
    group.make_communicator()->barrier();
    FAIL() << "did not throw";
  } catch (const CommError& error) {
    EXPECT_NE(std::string(error.what()).find("world_rank 1 has left the group"), std::string::npos)
        << error.what();
  }
  EXPECT_TRUE(group.has_failed());
}

TEST(ShmCommunicator, MissingMemberIsATimeout) {
  const auto shm =
      make_shm_communicator(group_of(2, 0), options_of(make_shm_segment_name(), 2, 0, 200));
  EXPECT_THROW(shm->barrier(), TimeoutError);
}

// Member 1 of a group of two, in a process of its own: attaches, meets member 0 once, then waits.
class Peer {
 public:
  // Returns when it has attached.
  explicit Peer(const std::string& segment) {
    int channel[2];
    if (pipe(channel) != 0) throw std::runtime_error("no pipe");
    pid_ = fork();
    if (pid_ != 0) {
      char byte = 0;
      const ssize_t count = read(channel[0], &byte, 1);
      close(channel[0]);
      close(channel[1]);
      if (count != 1) throw std::runtime_error("the peer did not start");
      return;
    }
    try {
      const auto shm = make_shm_communicator(group_of(2, 1), options_of(segment, 2, 1));
      if (write(channel[1], "x", 1) != 1) _exit(1);
      shm->barrier();
      pause();
    } catch (...) {
    }
    _exit(1);
  }
  ~Peer() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  void send(int signal) const { kill(pid_, signal); }

 private:
  pid_t pid_;
};

bool segment_exists(const std::string& name) {
  const std::string file = name.front() == '/' ? name.substr(1) : name;
  return std::filesystem::exists("/dev/shm/" + file);
}

// What member 0 sees when its peer gets `signal` between two operations. The time-out is short
// enough to wait for, or longer than the limit: then it was not what ended the operation.
template <typename Error>
void expect_error_after(int signal, int timeout_ms) {
  constexpr std::chrono::seconds limit(60);
  const std::string name = make_shm_segment_name();
  const auto shm = make_shm_communicator(group_of(2, 0), options_of(name, 2, 0, timeout_ms));
  EXPECT_TRUE(segment_exists(name));
  Peer peer(name);
  shm->barrier();
  EXPECT_FALSE(segment_exists(name));
  peer.send(signal);  // killed and not reaped: a zombie
  const auto begin = std::chrono::steady_clock::now();
  at::Tensor tensor = at::ones({1000});
  for (int attempt = 0; attempt < 2; ++attempt) {  // every later call fails too
    try {
      shm->all_reduce(tensor, *make_inline_stream());
      FAIL() << "did not throw";
    } catch (const Error& error) {
      EXPECT_NE(std::string(error.what()).find("world_rank 1"), std::string::npos) << error.what();
    }
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, limit);
}

TEST(ShmCommunicator, AKilledPeerIsACommErrorLongBeforeTheTimeout) {
  expect_error_after<CommError>(SIGKILL, 600000);
}

TEST(ShmCommunicator, AStoppedPeerIsATimeout) { expect_error_after<TimeoutError>(SIGSTOP, 2000); }

TEST(ShmCommunicator, ASegmentWhoseMakerWasKilledIsRemoved) {
  const std::string mine = make_shm_segment_name();
  const auto kept = make_shm_communicator(group_of(2, 0), options_of(mine, 2, 0));
  int channel[2];
  ASSERT_EQ(pipe(channel), 0);
  const pid_t maker = fork();
  if (maker == 0) {
    const std::string name = make_shm_segment_name();
    const auto shm = make_shm_communicator(group_of(2, 0), options_of(name, 2, 0));
    const ssize_t written = write(channel[1], name.c_str(), name.size() + 1);
    kill(getpid(), written > 0 ? SIGKILL : SIGTERM);
  }
  char name[256] = {};
  ASSERT_GT(read(channel[0], name, sizeof(name) - 1), 0);
  waitpid(maker, nullptr, 0);
  close(channel[0]);
  close(channel[1]);
  EXPECT_TRUE(segment_exists(name));
  EXPECT_GE(remove_stale_shm_segments(), 1);
  EXPECT_FALSE(segment_exists(name));
  EXPECT_TRUE(segment_exists(mine));  // its maker runs
}

}  // namespace
}  // namespace mics
