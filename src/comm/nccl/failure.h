// Failure: the first thing that went wrong in a world, seen by every launch and every wait.
//
// Thread safety: any thread.
#pragma once

#include <atomic>
#include <exception>
#include <mutex>
#include <utility>

namespace mics {

class Failure {
 public:
  // Later ones are dropped. False: there was one.
  bool set(std::exception_ptr exception) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (exception_) return false;
    exception_ = std::move(exception);
    is_set_ = true;
    return true;
  }
  [[nodiscard]] bool is_set() const { return is_set_; }
  void rethrow_if_set() const {
    if (!is_set_) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::rethrow_exception(exception_);
  }

 private:
  std::atomic<bool> is_set_ = false;
  mutable std::mutex mutex_;
  std::exception_ptr exception_;  // guarded by mutex_
};

}  // namespace mics
