// NcclHandle: one ncclComm_t from its start to its one end, by close or by abort.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "comm/nccl/nccl_api.h"

namespace mics {

// Thread safety: any thread; launches with what get() gave may meet an abort, as NCCL allows.
class NcclHandle {
 public:
  // `where`: "group gather/intra [0 1], world_rank=1", for messages. `name`: what was given to NCCL,
  // which keeps the pointer.
  NcclHandle(std::shared_ptr<NcclApi> nccl, std::string where,
             std::shared_ptr<const std::string> name, ncclComm_t comm)
      : nccl_(std::move(nccl)), where_(std::move(where)), name_(std::move(name)), comm_(comm) {}

  // Null once it has ended.
  [[nodiscard]] ncclComm_t get() const;
  [[nodiscard]] const std::string& where() const { return where_; }
  // Empty: none.
  [[nodiscard]] std::string async_error() const;
  void abort() noexcept;
  // Frees its resources; nothing may be in flight. Throws as finish_call(), after aborting it, and
  // CommError when it is aborted meanwhile.
  void close(std::chrono::milliseconds timeout);

 private:
  const std::shared_ptr<NcclApi> nccl_;
  const std::string where_;
  const std::shared_ptr<const std::string> name_;
  mutable std::mutex mutex_;
  ncclComm_t comm_;  // guarded by mutex_
};

// Returns when `poll`, called with pauses in between, gives another result than ncclInProgress. Throws
// TimeoutError "<call> must end in time ... (<where>)" at `deadline`.
[[nodiscard]] ncclResult_t poll_call(const std::function<ncclResult_t()>& poll, const char* call,
                                     const std::string& where,
                                     std::chrono::steady_clock::time_point deadline);

// Polls a call of a non-blocking communicator until it ends, at most until `deadline`. Throws
// CommError "<call> failed: ... (<where>)" or TimeoutError "<call> must end in time ... (<where>)".
void finish_call(NcclApi& nccl, ncclResult_t result, ncclComm_t comm, const char* call,
                 const std::string& where, std::chrono::steady_clock::time_point deadline);

}  // namespace mics
