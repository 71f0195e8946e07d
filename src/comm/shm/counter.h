// Counter: a number in shared memory that one process raises and others wait for.
//
// It wraps around; two values are compared by their difference, so they must be less than 2^31
// apart.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace mics::shm {

inline constexpr size_t kCacheLine = 64;

// Alone on its cache line: a member that spins on it disturbs nobody else.
class alignas(kCacheLine) Counter {
 public:
  [[nodiscard]] bool has_reached(uint32_t target) const {
    // Acquire: pairs with the store of raise(). What the owner wrote before is visible after.
    return is_at_least(value_.load(std::memory_order_acquire), target);
  }

  // By the owner. What it wrote before is visible to those that see the new value.
  void raise(uint32_t value);

  // Wakes all who wait, without a new value: they look again at whatever else they check.
  void wake_all();

  // Returns when the counter has reached `target`, or at `slice` at the latest; then false.
  // May return false earlier.
  [[nodiscard]] bool wait_for(uint32_t target, std::chrono::milliseconds slice);

 private:
  [[nodiscard]] static bool is_at_least(uint32_t value, uint32_t target) {
    return static_cast<int32_t>(value - target) >= 0;
  }

  std::atomic<uint32_t> value_{0};  // the futex word
  std::atomic<uint32_t> num_waiting_{0};
};

static_assert(std::atomic<uint32_t>::is_always_lock_free, "a lock would not be shared");

}  // namespace mics::shm
