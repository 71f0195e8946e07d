#include "comm/nccl/nccl_handle.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "mics/error.h"

namespace mics {

namespace {

std::string describe_failure(NcclApi& nccl, ncclResult_t result, ncclComm_t comm) {
  std::string text = nccl.error_string(result);
  const std::string last = nccl.last_error(comm);
  if (!last.empty()) text += " (" + last + ")";
  return text;
}

ncclResult_t state_of(NcclApi& nccl, ncclComm_t comm) {
  ncclResult_t state = ncclSuccess;
  const ncclResult_t asked = nccl.comm_get_async_error(comm, &state);
  return asked != ncclSuccess ? asked : state;
}

}  // namespace

ncclResult_t poll_call(const std::function<ncclResult_t()>& poll, const char* call,
                       const std::string& where, std::chrono::steady_clock::time_point deadline) {
  std::chrono::microseconds pause{10};
  while (true) {
    const ncclResult_t result = poll();
    if (result != ncclInProgress) return result;
    if (std::chrono::steady_clock::now() > deadline) {
      throw TimeoutError(std::string(call) +
                         " must end in time: a peer has not joined, or NCCL waits for the network "
                         "(" +
                         where + "). See docs/errors.md#timeouts.");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
  }
}

void finish_call(NcclApi& nccl, ncclResult_t result, ncclComm_t comm, const char* call,
                 const std::string& where, std::chrono::steady_clock::time_point deadline) {
  if (result == ncclInProgress) {
    result = poll_call([&] { return state_of(nccl, comm); }, call, where, deadline);
  }
  if (result == ncclSuccess) return;
  throw CommError(std::string(call) + " failed: " + describe_failure(nccl, result, comm) + " (" +
                  where + ").");
}

ncclComm_t NcclHandle::get() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return comm_;
}

std::string NcclHandle::async_error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (comm_ == nullptr) return {};
  const ncclResult_t error = state_of(*nccl_, comm_);
  if (error == ncclSuccess || error == ncclInProgress) return {};
  return describe_failure(*nccl_, error, comm_);
}

void NcclHandle::abort() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (comm_ == nullptr) return;
  (void)nccl_->comm_abort(comm_);  // nothing can be done about an error
  comm_ = nullptr;
}

// The lock is not held while NCCL works or is waited for: the watchdog may have to abort meanwhile.
void NcclHandle::close(std::chrono::milliseconds timeout) {
  const ncclComm_t closed = get();
  if (closed == nullptr) return;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  try {
    ncclResult_t result = nccl_->comm_finalize(closed);
    if (result == ncclInProgress) {
      const auto poll = [this] {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (comm_ == nullptr) {
          throw CommError(
              "a communicator was aborted while it was closed: something has failed meanwhile (" +
              where_ + ").");
        }
        return state_of(*nccl_, comm_);
      };
      result = poll_call(poll, "ncclCommFinalize", where_, deadline);
    }
    finish_call(*nccl_, result, nullptr, "ncclCommFinalize", where_, deadline);
  } catch (...) {
    abort();
    throw;
  }
  const ncclComm_t comm = [this] {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(comm_, nullptr);
  }();
  if (comm == nullptr) return;  // aborted
  finish_call(*nccl_, nccl_->comm_destroy(comm), nullptr, "ncclCommDestroy", where_, deadline);
}

}  // namespace mics
