// What the ranks of FakeNccl share: the members of a communicator, which meet, and what went wrong.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "comm/nccl/nccl_api.h"

namespace mics::testing {

struct FakeCall {
  enum class Kind { kAllGather, kReduceScatter, kAllReduce };
  Kind kind = Kind::kAllGather;
  const void* send = nullptr;
  void* receive = nullptr;
  size_t count = 0;  // as given to NCCL
  ncclDataType_t type = ncclFloat32;
};

// The members of one communicator.
class FakeRendezvous {
 public:
  explicit FakeRendezvous(int size) : size_(size), calls_(static_cast<size_t>(size)) {}

  // Shows `calls` to the others, or nothing, and returns when all have come. False: `is_aborted`.
  bool meet(int rank, const std::vector<FakeCall>* calls, const std::atomic<bool>& is_aborted) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (calls != nullptr) calls_[static_cast<size_t>(rank)] = calls;
    const int64_t generation = generation_;
    if (++num_arrived_ == size_) {
      num_arrived_ = 0;
      ++generation_;
      changed_.notify_all();
      return true;
    }
    changed_.wait(lock, [&] { return generation_ != generation || is_aborted; });
    if (generation_ != generation) return true;
    --num_arrived_;
    return false;
  }
  // Returns when all have come, whatever is aborted: after a meeting of all, members only read and
  // write, and none may go while another reads what it has shown.
  void stay_until_all_have_come() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t generation = generation_;
    if (++num_arrived_ < size_) {
      return changed_.wait(lock, [&] { return generation_ != generation; });
    }
    num_arrived_ = 0;
    ++generation_;
    changed_.notify_all();
  }
  void wait_for_abort(const std::atomic<bool>& is_aborted) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return is_aborted.load(); });
  }
  void notify() {
    const std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }
  // Valid between two meetings.
  [[nodiscard]] const std::vector<FakeCall>& calls_of(int rank) const {
    return *calls_[static_cast<size_t>(rank)];
  }
  [[nodiscard]] int size() const { return size_; }

 private:
  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int num_arrived_ = 0;
  int64_t generation_ = 0;
  std::vector<const std::vector<FakeCall>*> calls_;
};

// What the ranks share.
class FakeNetwork {
 public:
  ncclUniqueId make_id() {
    const std::lock_guard<std::mutex> lock(mutex_);
    ncclUniqueId id = {};
    const int number = ++num_ids_;
    std::memcpy(id.internal, &number, sizeof(number));
    return id;
  }
  [[nodiscard]] std::shared_ptr<FakeRendezvous> rendezvous(const std::string& key, int size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<FakeRendezvous>& found = rendezvous_[key];
    if (found == nullptr) found = std::make_shared<FakeRendezvous>(size);
    return found;
  }
  void add_fault(const std::string& fault) {
    const std::lock_guard<std::mutex> lock(mutex_);
    faults_.push_back(fault);
  }
  // What would be a hang or undefined on a device.
  [[nodiscard]] std::vector<std::string> faults() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return faults_;
  }
  std::atomic<int> num_live_comms = 0;

 private:
  mutable std::mutex mutex_;
  int num_ids_ = 0;
  std::map<std::string, std::shared_ptr<FakeRendezvous>> rendezvous_;
  std::vector<std::string> faults_;
};

struct FakeComm {
  std::string key;
  std::shared_ptr<FakeRendezvous> members;
  int rank = 0;
  int num_splits = 0;
  std::atomic<bool> is_ready = true;  // false: a start in non-blocking mode
  std::atomic<bool> is_aborted = false;
  std::atomic<ncclResult_t> async_error = ncclSuccess;
  std::mutex mutex;
  std::condition_variable turn_came;
  int64_t num_launched = 0;
  int64_t num_run = 0;  // guarded by mutex
};

}  // namespace mics::testing
