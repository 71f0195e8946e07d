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

}  // namespace

void finish_call(NcclApi& nccl, ncclResult_t result, ncclComm_t comm, const char* call,
                 const std::string& where, std::chrono::steady_clock::time_point deadline) {
  std::chrono::microseconds pause{10};
  while (result == ncclInProgress) {
    if (std::chrono::steady_clock::now() > deadline) {
      throw TimeoutError(std::string(call) +
                         " must end in time: a peer has not joined, or NCCL waits for the network "
                         "(" +
                         where + "). See docs/errors.md#timeouts.");
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
    const ncclResult_t asked = nccl.comm_get_async_error(comm, &result);
    if (asked != ncclSuccess) result = asked;
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
  ncclResult_t error = ncclSuccess;
  const ncclResult_t asked = nccl_->comm_get_async_error(comm_, &error);
  if (asked != ncclSuccess) error = asked;
  if (error == ncclSuccess || error == ncclInProgress) return {};
  return describe_failure(*nccl_, error, comm_);
}

void NcclHandle::abort() noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (comm_ == nullptr) return;
  (void)nccl_->comm_abort(comm_);  // nothing can be done about an error
  comm_ = nullptr;
}

void NcclHandle::close(std::chrono::milliseconds timeout) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (comm_ == nullptr) return;
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  try {
    finish_call(*nccl_, nccl_->comm_finalize(comm_), comm_, "ncclCommFinalize", where_, deadline);
  } catch (...) {
    (void)nccl_->comm_abort(comm_);
    comm_ = nullptr;
    throw;
  }
  const ncclComm_t comm = std::exchange(comm_, nullptr);
  finish_call(*nccl_, nccl_->comm_destroy(comm), nullptr, "ncclCommDestroy", where_, deadline);
}

}  // namespace mics
