// FakeNcclComms: the communicators of one rank of FakeNccl that live, and how they end.
//
//   - an abort waits for every communicator of the rank that is busy, as the real one may wait for
//     the device: those that are aborted in one group end together
//   - a communicator that ends while a call of another thread is inside it is a fault
//
// Thread safety: any thread.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "support/fake_nccl_memory.h"
#include "support/fake_network.h"

namespace mics::testing {

// The calling thread is inside NCCL with a communicator, for `delay` at least.
class FakeInside {
 public:
  FakeInside(std::shared_ptr<FakeComm> comm, std::chrono::milliseconds delay)
      : comm_(std::move(comm)) {
    ++comm_->num_inside;
    if (delay.count() > 0) std::this_thread::sleep_for(delay);
  }
  ~FakeInside() { --comm_->num_inside; }
  FakeInside(const FakeInside&) = delete;
  FakeInside& operator=(const FakeInside&) = delete;

 private:
  const std::shared_ptr<FakeComm> comm_;
};

// Operations of a rank whose streams have reached them and that are not done.
struct FakeUnderWay {
  std::atomic<int> now = 0;
  std::atomic<int> most = 0;
  void begin() {
    const int mine = ++now;
    for (int before = most; mine > before;) {
      if (most.compare_exchange_weak(before, mine)) break;
    }
  }
};

class FakeNcclComms {
 public:
  FakeNcclComms(std::shared_ptr<FakeNetwork> network, FakeNcclMemory& memory)
      : network_(std::move(network)), memory_(memory) {}

  ncclComm_t add(const std::shared_ptr<FakeComm>& comm) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto* const handle = reinterpret_cast<ncclComm_t>(comm.get());
    comms_.emplace(handle, comm);
    ++network_->num_live_comms;
    return handle;
  }
  // Null: it has ended, which is a fault.
  [[nodiscard]] std::shared_ptr<FakeComm> find(ncclComm_t comm, const std::string& call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = comms_.find(comm);
    if (found != comms_.end()) return found->second;
    network_->add_fault(call + " of a communicator that has ended");
    return nullptr;
  }
  [[nodiscard]] std::vector<std::shared_ptr<FakeComm>> all() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<std::shared_ptr<FakeComm>> found;
    for (const auto& [handle, comm] : comms_) found.push_back(comm);
    return found;
  }

  // How long an abort waits before that is a fault. The real one would wait for ever.
  void set_abort_limit(std::chrono::milliseconds limit) { abort_limit_ = limit; }

  ncclResult_t destroy(ncclComm_t comm) {
    const std::shared_ptr<FakeComm> ended = find(comm, "comm_destroy");
    if (ended == nullptr) return ncclInvalidArgument;
    end(*ended);
    return ncclSuccess;
  }
  // In one group.
  ncclResult_t abort(const std::vector<ncclComm_t>& comms) {
    for (ncclComm_t comm : comms) {
      const std::shared_ptr<FakeComm> ended = find(comm, "comm_abort");
      if (ended == nullptr) return ncclInvalidArgument;
      end(*ended);
    }
    const auto limit = std::chrono::steady_clock::now() + abort_limit_;
    const auto is_busy = [](const auto& comm) { return comm->num_running > 0; };
    while (true) {
      const std::vector<std::shared_ptr<FakeComm>> living = all();
      if (std::none_of(living.begin(), living.end(), is_busy)) return ncclSuccess;
      if (std::chrono::steady_clock::now() > limit) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    network_->add_fault("an abort that waits for a communicator which is not aborted");
    return ncclSuccess;
  }

 private:
  void end(FakeComm& comm) {
    if (comm.name != nullptr && comm.expected_name != comm.name) {
      network_->add_fault("the name of a communicator is gone before it");
    }
    if (comm.num_inside > 0 && !comm.is_stuck) {
      network_->add_fault("a communicator ends while a call of another thread is inside it");
    }
    memory_.remove_all_of(comm);
    --network_->num_live_comms;
    {
      const std::lock_guard<std::mutex> lock(comm.mutex);
      comm.is_aborted = true;
      comm.turn_came.notify_all();
    }
    comm.members->notify();
    const std::lock_guard<std::mutex> lock(mutex_);
    comms_.erase(reinterpret_cast<ncclComm_t>(&comm));
  }

  const std::shared_ptr<FakeNetwork> network_;
  FakeNcclMemory& memory_;
  std::chrono::milliseconds abort_limit_{60000};
  mutable std::mutex mutex_;
  std::map<ncclComm_t, std::shared_ptr<FakeComm>> comms_;  // guarded by mutex_
};

}  // namespace mics::testing
