// NcclHandle: one ncclComm_t from its start to its one end, by close or by abort.
//
//   open     uses come and go
//   ending   an abort waits for the uses that are left; new ones get nothing
//   ended    its ncclComm_t is NCCL's no longer, or about to be freed by who has taken it
//
// An abort never meets a call of another thread inside NCCL, unless that call does not return in
// time: then only the abort can end it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl/nccl_api.h"

namespace mics {

// Thread safety: any thread.
class NcclHandle {
 public:
  // `where`: "group gather/intra [0 1], world_rank=1", for messages.
  NcclHandle(std::shared_ptr<NcclApi> nccl, std::string where, ncclComm_t comm)
      : nccl_(std::move(nccl)), where_(std::move(where)), comm_(comm) {}

  // A thread calls NCCL with the communicator. To be destroyed before the thread aborts it.
  class Use {
   public:
    explicit Use(NcclHandle& handle) : handle_(handle), comm_(handle.begin_use()) {}
    ~Use() {
      if (comm_ != nullptr) handle_.end_use();
    }
    Use(const Use&) = delete;
    Use& operator=(const Use&) = delete;
    // Null when it is not open.
    [[nodiscard]] ncclComm_t comm() const { return comm_; }

   private:
    NcclHandle& handle_;
    const ncclComm_t comm_;
  };

  [[nodiscard]] bool is_open() const;
  [[nodiscard]] const std::string& where() const { return where_; }
  // Empty: none.
  [[nodiscard]] std::string async_error() const;
  // Polls a call of a non-blocking communicator until it ends, as finish_call(). Throws CommError
  // when the communicator is aborted meanwhile.
  void finish(ncclResult_t result, const char* call,
              std::chrono::steady_clock::time_point deadline) const;
  // Frees its resources; nothing may be in flight. Throws as finish(); then the caller aborts it.
  // Nothing when it is not open.
  void close(std::chrono::milliseconds timeout);

 private:
  friend void abort_together(NcclApi& nccl, const std::vector<std::shared_ptr<NcclHandle>>& handles,
                             std::chrono::milliseconds patience) noexcept;
  [[nodiscard]] ncclComm_t begin_use();
  void end_use();
  void begin_end();
  // Waits for the uses, until `deadline` at most, and takes the communicator; null: it has ended.
  [[nodiscard]] ncclComm_t take(std::chrono::steady_clock::time_point deadline);

  const std::shared_ptr<NcclApi> nccl_;
  const std::string where_;
  mutable std::mutex mutex_;
  std::condition_variable unused_;
  // Guarded by mutex_.
  ncclComm_t comm_;
  bool is_ending_ = false;
  int num_uses_ = 0;
};

// Aborts those that have not ended, in one NCCL group where the library can: ncclCommAbort may wait
// for the device, and so for a collective of another one. First waits for calls of other threads
// that are inside NCCL, `patience` at most for all; uses that begin later get nothing.
void abort_together(NcclApi& nccl, const std::vector<std::shared_ptr<NcclHandle>>& handles,
                    std::chrono::milliseconds patience) noexcept;

// Polls a call of a non-blocking communicator until it ends, at most until `deadline`. Throws
// CommError "<call> failed: ... (<where>)" or TimeoutError "<call> must end in time ... (<where>)".
void finish_call(NcclApi& nccl, ncclResult_t result, ncclComm_t comm, const char* call,
                 const std::string& where, std::chrono::steady_clock::time_point deadline);

}  // namespace mics
