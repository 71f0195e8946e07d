// Counts what the process allocates and copies while an instance lives: every tensor memory on the
// CPU, by all threads, and every copying operator of this thread.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace mics::testing {

class CountingAllocator final : public c10::Allocator {
 public:
  CountingAllocator() : inner_(c10::GetCPUAllocator()) { c10::SetCPUAllocator(this, 100); }
  ~CountingAllocator() override { c10::SetCPUAllocator(inner_, 100); }
  CountingAllocator(const CountingAllocator&) = delete;
  CountingAllocator& operator=(const CountingAllocator&) = delete;

  c10::DataPtr allocate(size_t nbytes) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_.push_back(nbytes);
    return inner_->allocate(nbytes);
  }
  void copy_data(void* to, const void* from, std::size_t count) const override {
    inner_->copy_data(to, from, count);
  }
  // Of the allocations since the last call, ascending.
  [[nodiscard]] std::vector<size_t> take_sizes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<size_t> taken;
    taken.swap(sizes_);
    std::sort(taken.begin(), taken.end());
    return taken;
  }

 private:
  c10::Allocator* const inner_;
  std::mutex mutex_;
  std::vector<size_t> sizes_;  // guarded by mutex_
};

// Operators by name, of those that move the bytes of a tensor.
class CopyCounter {
 public:
  CopyCounter() {
    handle_ = at::addThreadLocalCallback(
        at::RecordFunctionCallback(&CopyCounter::enter).scopes({at::RecordScope::FUNCTION}));
    counts().clear();
  }
  ~CopyCounter() { at::removeCallback(handle_); }
  CopyCounter(const CopyCounter&) = delete;
  CopyCounter& operator=(const CopyCounter&) = delete;

  [[nodiscard]] std::map<std::string, int> take() {
    std::map<std::string, int> taken;
    taken.swap(counts());
    return taken;
  }

 private:
  static std::map<std::string, int>& counts() {
    static thread_local std::map<std::string, int> of_thread;
    return of_thread;
  }
  static std::unique_ptr<at::ObserverContext> enter(const at::RecordFunction& function) {
    static const std::set<std::string> kMoving = {
        "aten::copy_", "aten::clone", "aten::_to_copy", "aten::cat",  "aten::contiguous",
        "aten::zero_", "aten::fill_", "aten::add_",     "aten::mul_", "aten::zeros_like"};
    if (const std::string name = function.name(); kMoving.count(name) != 0) ++counts()[name];
    return nullptr;
  }

  at::CallbackHandle handle_;
};

}  // namespace mics::testing
