// FakeNcclMemory: what one rank has from ncclMemAlloc, and what is registered of it. It holds no
// numbers when it is given out and none when it is given back.
//
// Thread safety: any thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "comm/nccl/nccl_api.h"
#include "support/fake_network.h"
#include "support/poisoned_memory.h"

namespace mics::testing {

class FakeNcclMemory {
 public:
  struct Registration {
    std::shared_ptr<FakeComm> comm;
    void* memory;
    size_t nbytes;
    bool is_window;
  };

  explicit FakeNcclMemory(std::shared_ptr<FakeNetwork> network) : network_(std::move(network)) {}

  void* allocate(size_t nbytes) {
    void* memory = std::aligned_alloc(kPage, (nbytes + kPage - 1) / kPage * kPage);
    std::memset(memory, kPoison, nbytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    allocations_.emplace(memory, nbytes);
    return memory;
  }
  ncclResult_t free(void* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = allocations_.find(memory);
    if (found == allocations_.end()) return ncclInvalidArgument;
    for (const auto& [handle, registered] : registrations_) {
      if (registered.memory == memory) network_->add_fault("freed while it is registered");
    }
    std::memset(memory, kPoison, found->second);
    std::free(memory);
    allocations_.erase(found);
    return ncclSuccess;
  }

  // Whether `made` may be registered by `call`.
  [[nodiscard]] bool check(const Registration& made, const char* call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto allocation = allocations_.find(made.memory);
    if (allocation == allocations_.end() || allocation->second < made.nbytes) return false;
    for (const auto& [handle, other] : registrations_) {
      if (other.comm == made.comm && other.memory == made.memory) {
        network_->add_fault(std::string(call) + " of memory that is registered");
      }
    }
    return true;
  }
  // Its handle.
  void* add(const Registration& made) {
    const std::lock_guard<std::mutex> lock(mutex_);
    void* handle = reinterpret_cast<void*>(++num_registrations_);
    registrations_.emplace(handle, made);
    return handle;
  }
  ncclResult_t remove(void* handle) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return registrations_.erase(handle) == 1 ? ncclSuccess : ncclInvalidArgument;
  }
  void remove_all_of(const FakeComm& comm) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::erase_if(registrations_, [&](const auto& one) { return one.second.comm.get() == &comm; });
  }

  [[nodiscard]] bool is_in_window(const FakeComm& comm, const void* data) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto* byte = static_cast<const char*>(data);
    for (const auto& [handle, registered] : registrations_) {
      const auto* first = static_cast<const char*>(registered.memory);
      if (registered.comm.get() == &comm && registered.is_window && byte >= first &&
          byte < first + registered.nbytes) {
        return true;
      }
    }
    return false;
  }
  // Allocations and registrations that have not ended.
  [[nodiscard]] int num_held() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int>(allocations_.size() + registrations_.size());
  }

 private:
  static constexpr size_t kPage = 4096;

  const std::shared_ptr<FakeNetwork> network_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<void*, size_t> allocations_;
  std::map<void*, Registration> registrations_;  // by handle
  uintptr_t num_registrations_ = 0;
};

}  // namespace mics::testing
