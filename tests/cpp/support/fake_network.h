// What the ranks of FakeNccl share: how members of a communicator meet, and what went wrong.
//
// Here is the interface. Ranks that are threads meet in thread_network.h, ranks that are processes
// in shm_network.h.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "comm/nccl/nccl_api.h"

namespace mics::testing {

struct FakeCall {
  // kRegister: no data; `count` bytes of memory are registered.
  enum class Kind { kAllGather, kReduceScatter, kAllReduce, kRegister };
  Kind kind = Kind::kAllGather;
  const void* send = nullptr;
  void* receive = nullptr;
  size_t count = 0;  // as given to NCCL
  ncclDataType_t type = ncclFloat32;
};

// The members of one communicator.
class FakeMembers {
 public:
  virtual ~FakeMembers() = default;
  [[nodiscard]] virtual int size() const = 0;
  // Returns when all have come. False: `is_aborted`.
  virtual bool meet(int rank, const std::atomic<bool>& is_aborted) = 0;
  // Does `calls` with all other members, on the calling thread. What differs between members is a
  // fault, and lasts until `is_aborted`.
  virtual void run(int rank, const std::vector<FakeCall>& calls,
                   const std::atomic<bool>& is_aborted) = 0;
  // Some member's `is_aborted` has been set.
  virtual void notify() = 0;
};

class FakeNetwork {
 public:
  virtual ~FakeNetwork() = default;
  // Its text names a communicator that no other id names.
  [[nodiscard]] virtual ncclUniqueId make_id() = 0;
  [[nodiscard]] virtual std::shared_ptr<FakeMembers> join(const std::string& key, int size,
                                                          int rank) = 0;

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
  // Sums are as those of the other backends: in fp32, rounded once. Else as NCCL's, in the dtype of
  // the wire. Both are in rank order.
  std::atomic<bool> sums_in_fp32 = false;

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> faults_;  // guarded by mutex_
};

// One rank's part of a communicator.
struct FakeComm {
  std::string key;
  std::shared_ptr<FakeMembers> members;
  int rank = 0;
  int num_splits = 0;
  int cta_policy = 0;
  const char* name = nullptr;  // the caller's
  std::string expected_name;
  bool is_blocking = true;
  std::atomic<bool> is_ready = true;  // false: a call in non-blocking mode is under way
  std::atomic<bool> is_aborted = false;
  std::atomic<ncclResult_t> async_error = ncclSuccess;
  std::mutex mutex;
  std::condition_variable turn_came;
  int64_t num_launched = 0;
  int64_t num_run = 0;                 // guarded by mutex
  std::atomic<int> num_running = 0;    // operations that their stream has reached
  std::atomic<int> num_inside = 0;     // threads in a call with it
  std::atomic<bool> is_stuck = false;  // a launch that only an abort ends
};

}  // namespace mics::testing
