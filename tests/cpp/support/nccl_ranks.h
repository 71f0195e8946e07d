// Ranks as threads whose worlds are the production NCCL code over the fakes.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <utility>
#include <vector>

#include "mics/error.h"
#include "mics/nccl_world.h"
#include "mics/runtime_streams.h"
#include "support/fake_nccl.h"
#include "support/multi_rank.h"
#include "support/thread_network.h"

namespace mics::testing {

inline GroupInfo group_of(const std::vector<int>& world_ranks, int world_rank,
                          const std::string& name = "test") {
  GroupInfo group{name, world_ranks, std::vector<int>(world_ranks.size(), 0), 0};
  while (group.world_ranks[static_cast<size_t>(group.rank)] != world_rank) ++group.rank;
  return group;
}

// What `body` throws on each rank; empty: nothing.
inline std::vector<std::string> errors_of(int size, const std::function<void(int)>& body) {
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

inline bool has(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class NcclRanks {
 public:
  // `seed`: of random delays of up to `max_delay_us`; 0: none.
  explicit NcclRanks(int size, unsigned seed = 0, unsigned max_delay_us = 300)
      : store_(c10::make_intrusive<c10d::HashStore>()),
        network_(std::make_shared<ThreadNetwork>()) {
    for (int rank = 0; rank < size; ++rank) {
      cuda_.push_back(std::make_shared<FakeCuda>(
          "0000:00:" + std::to_string(rank),
          seed == 0 ? 0 : seed + 1000 * static_cast<unsigned>(rank), max_delay_us));
      nccl_.push_back(std::make_shared<FakeNccl>(network_, cuda_.back()));
      NcclOptions options;
      options.rank = rank;
      options.world_size = size;
      options.host = "host";
      options.watch_interval = std::chrono::milliseconds(10);
      options_.push_back(options);
    }
  }

  ~NcclRanks() {
    for (const std::shared_ptr<FakeCuda>& cuda : cuda_) EXPECT_EQ(cuda->num_live_events(), 0);
    for (const std::shared_ptr<FakeNccl>& nccl : nccl_) EXPECT_EQ(nccl->num_held(), 0);
  }
  NcclRanks(const NcclRanks&) = delete;
  NcclRanks& operator=(const NcclRanks&) = delete;

  NcclOptions& options(int rank) { return options_[static_cast<size_t>(rank)]; }
  FakeCuda& cuda(int rank) { return *cuda_[static_cast<size_t>(rank)]; }
  FakeNccl& nccl(int rank) { return *nccl_[static_cast<size_t>(rank)]; }
  FakeNetwork& network() { return *network_; }

  // On the thread of the rank.
  [[nodiscard]] std::shared_ptr<NcclWorld> make_world(int rank) {
    const auto index = static_cast<size_t>(rank);
    return NcclWorld::create(store_, options_[index], cuda_[index], nccl_[index]);
  }

 private:
  const c10::intrusive_ptr<c10d::Store> store_;
  const std::shared_ptr<FakeNetwork> network_;
  std::vector<std::shared_ptr<FakeCuda>> cuda_;
  std::vector<std::shared_ptr<FakeNccl>> nccl_;
  std::vector<NcclOptions> options_;
};

// As a CUDA rank has them: all but the replicas' sums at high priority.
inline std::shared_ptr<RuntimeStreams> make_streams(NcclWorld& world) {
  return std::make_shared<RuntimeStreams>(
      RuntimeStreams{world.make_current_stream(), world.make_stream(true), world.make_stream(true),
                     world.make_stream(true), world.make_stream(true), world.make_stream(false),
                     /*frees_in_compute_order=*/true});
}

}  // namespace mics::testing
