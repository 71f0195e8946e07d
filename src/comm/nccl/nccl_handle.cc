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

// Calls `poll`, with pauses in between, until it gives another result than ncclInProgress.
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

}  // namespace

void finish_call(NcclApi& nccl, ncclResult_t result, ncclComm_t comm, const char* call,
                 const std::string& where, std::chrono::steady_clock::time_point deadline) {
  if (result == ncclInProgress) {
    result = poll_call([&] { return state_of(nccl, comm); }, call, where, deadline);
  }
  if (result == ncclSuccess) return;
  throw CommError(std::string(call) + " failed: " + describe_failure(nccl, result, comm) + " (" +
                  where + ").");
}

bool NcclHandle::is_open() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return comm_ != nullptr && !is_ending_;
}

ncclComm_t NcclHandle::begin_use() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (comm_ == nullptr || is_ending_) return nullptr;
  ++num_uses_;
  return comm_;
}

void NcclHandle::end_use() {
  const std::lock_guard<std::mutex> lock(mutex_);
  --num_uses_;
  unused_.notify_all();
}

void NcclHandle::begin_end() {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_ending_ = true;
}

ncclComm_t NcclHandle::take(std::chrono::steady_clock::time_point deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  is_ending_ = true;
  unused_.wait_until(lock, deadline, [this] { return num_uses_ == 0; });
  return std::exchange(comm_, nullptr);
}

std::string NcclHandle::async_error() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (comm_ == nullptr || is_ending_) return {};
  const ncclResult_t error = state_of(*nccl_, comm_);
  if (error == ncclSuccess || error == ncclInProgress) return {};
  return describe_failure(*nccl_, error, comm_);
}

void NcclHandle::finish(ncclResult_t result, const char* call,
                        std::chrono::steady_clock::time_point deadline) const {
  const auto poll = [&] {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (comm_ == nullptr || is_ending_) {
      throw CommError(std::string("a communicator was aborted during ") + call +
                      ": something has failed meanwhile (" + where_ + ").");
    }
    return state_of(*nccl_, comm_);
  };
  if (result == ncclInProgress) result = poll_call(poll, call, where_, deadline);
  finish_call(*nccl_, result, nullptr, call, where_, deadline);
}

// Others may have to abort it while NCCL works here.
void NcclHandle::close(std::chrono::milliseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  ncclResult_t result = ncclSuccess;
  {
    const Use use(*this);
    if (use.comm() == nullptr) return;
    result = nccl_->comm_finalize(use.comm());
  }
  finish(result, "ncclCommFinalize", deadline);
  const ncclComm_t comm = take(deadline);
  if (comm == nullptr) return;  // aborted
  finish_call(*nccl_, nccl_->comm_destroy(comm), nullptr, "ncclCommDestroy", where_, deadline);
}

void abort_together(NcclApi& nccl, const std::vector<std::shared_ptr<NcclHandle>>& handles,
                    std::chrono::milliseconds patience) noexcept {
  const auto deadline = std::chrono::steady_clock::now() + patience;
  for (const std::shared_ptr<NcclHandle>& handle : handles) handle->begin_end();
  std::vector<ncclComm_t> taken;
  for (const std::shared_ptr<NcclHandle>& handle : handles) {
    if (const ncclComm_t comm = handle->take(deadline); comm != nullptr) taken.push_back(comm);
  }
  // Nothing can be done about an error.
  const bool is_group = taken.size() > 1 && nccl.has_group_abort();
  if (is_group) (void)nccl.group_start();
  for (const ncclComm_t comm : taken) (void)nccl.comm_abort(comm);
  if (is_group) (void)nccl.group_end();
}

}  // namespace mics
