// Counts what the process allocates and copies while an instance lives: every tensor memory on the
// CPU, by all threads, and every copying operator of this thread.
#pragma once

#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
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
    *live_nbytes_ += static_cast<int64_t>(nbytes);
    auto* owned = new Owned{inner_->allocate(nbytes), live_nbytes_, static_cast<int64_t>(nbytes)};
    return {owned->memory.get(), owned, &Owned::free, at::kCPU};
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
  // Of what was allocated since construction and not freed.
  [[nodiscard]] int64_t live_nbytes() const { return *live_nbytes_; }

 private:
  // May outlive the allocator.
  struct Owned {
    c10::DataPtr memory;
    std::shared_ptr<std::atomic<int64_t>> live_nbytes;
    int64_t nbytes;
    static void free(void* owned) {
      const std::unique_ptr<Owned> freed(static_cast<Owned*>(owned));
      *freed->live_nbytes -= freed->nbytes;
    }
  };

  c10::Allocator* const inner_;
  const std::shared_ptr<std::atomic<int64_t>> live_nbytes_ =
      std::make_shared<std::atomic<int64_t>>(0);
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
