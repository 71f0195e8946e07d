// NcclHandle: one ncclComm_t from its start to its one end, by close or by abort.
#pragma once

#include <chrono>
#include <memory>
#include <mutex>
#include <string>

#include "comm/nccl/nccl_api.h"

namespace mics {

// Thread safety: any thread; launches with what get() gave may meet an abort, as NCCL allows.
class NcclHandle {
 public:
  NcclHandle(std::shared_ptr<NcclApi> nccl, std::string name, ncclComm_t comm)
      : nccl_(std::move(nccl)), name_(std::move(name)), comm_(comm) {}

  // Null once it has ended.
  [[nodiscard]] ncclComm_t get() const;
  [[nodiscard]] const std::string& name() const { return name_; }
  // Empty: none.
  [[nodiscard]] std::string async_error() const;
  void abort() noexcept;
  // Lets its resources go; nothing may be under way. Throws CommError.
  void close(std::chrono::milliseconds timeout);

 private:
  const std::shared_ptr<NcclApi> nccl_;
  const std::string name_;
  mutable std::mutex mutex_;
  ncclComm_t comm_;  // guarded by mutex_
};

// Waits while a non-blocking communicator is at work, until `deadline`. Throws CommError "<call>
// failed: ..." or TimeoutError.
void finish_call(NcclApi& nccl, ncclResult_t result, ncclComm_t comm, const char* call,
                 std::chrono::steady_clock::time_point deadline);

}  // namespace mics
