// PoisonedMemory: while one lives, torch's memory on the CPU holds no numbers when it is given out,
// and none once it has been given back: NaN in every floating type, -1 in every integer.
//
// Tensors of FakeCuda lie on the CPU, and its compute stream is the caller's thread; so memory is
// poisoned in the order of compute, as torch's caching allocator would give it to the next owner.
// Whoever still reads it on another stream computes with NaN. Who watches is told of each
// allocation and each free, on the thread that asks.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <utility>

namespace mics::testing {

inline constexpr int kPoison = 0xFF;

// Told of memory: its address, its bytes, and whether it is given out.
using MemoryWatcher = std::function<void(void* data, size_t nbytes, bool is_given_out)>;

class PoisoningAllocator final : public c10::Allocator {
 public:
  // Null: nobody. While no other thread uses torch.
  static void watch(MemoryWatcher watcher) { watcher_ = std::move(watcher); }

  c10::DataPtr allocate(size_t nbytes) override {
    const size_t total = (nbytes + 2 * kHeader - 1) / kHeader * kHeader;
    void* start = std::aligned_alloc(kHeader, total);
    if (start == nullptr) throw std::bad_alloc();
    std::memcpy(start, &nbytes, sizeof(nbytes));
    void* data = static_cast<char*>(start) + kHeader;
    std::memset(data, kPoison, nbytes);
    if (watcher_) watcher_(data, nbytes, true);
    return {data, data, &give_back, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    default_copy_data(to, from, nbytes);
  }

 private:
  static constexpr size_t kHeader = 64;  // holds the size; what torch aligns to

  static void give_back(void* data) {
    if (data == nullptr) return;
    void* start = static_cast<char*>(data) - kHeader;
    size_t nbytes = 0;
    std::memcpy(&nbytes, start, sizeof(nbytes));
    if (watcher_) watcher_(data, nbytes, false);
    std::memset(data, kPoison, nbytes);
    std::free(start);
  }

  inline static MemoryWatcher watcher_;  // deleters of torch's memory are plain functions
};

class PoisonedMemory {
 public:
  PoisonedMemory() : usual_(c10::GetCPUAllocator()) {
    static PoisoningAllocator allocator;  // outlives every tensor
    c10::SetCPUAllocator(&allocator, kPriority);
  }
  ~PoisonedMemory() { c10::SetCPUAllocator(usual_, kPriority); }
  PoisonedMemory(const PoisonedMemory&) = delete;
  PoisonedMemory& operator=(const PoisonedMemory&) = delete;

 private:
  // That of CountingAllocator: torch keeps the highest that it has seen.
  static constexpr uint8_t kPriority = 100;
  c10::Allocator* const usual_;
};

}  // namespace mics::testing
