#include "comm/shm/counter.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <ctime>

namespace mics::shm {

namespace {

// Not FUTEX_PRIVATE: the waiters are other processes, with other addresses for the same word.
void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

// Sleeps while the word is `seen`, for `slice` at most. Signals and stray wakes end it too.
void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, std::chrono::milliseconds slice) {
  timespec limit{};
  limit.tv_sec = static_cast<time_t>(slice.count() / 1000);
  limit.tv_nsec = static_cast<long>(slice.count() % 1000) * 1'000'000;
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &limit, nullptr, 0);
}

}  // namespace

// The store here and the load of num_waiting_, like the addition and the load in wait_for(), are
// sequentially consistent: of an owner that stores and then looks for waiters, and a waiter that
// announces itself and then looks at the value, at least one sees the other. With weaker orders
// both could miss, and the waiter would sleep through. The store is a release as well: see
// has_reached().
void Counter::raise(uint32_t value) {
  value_.store(value, std::memory_order_seq_cst);
  if (num_waiting_.load(std::memory_order_seq_cst) != 0) futex_wake_all(value_);
}

void Counter::wake_all() { futex_wake_all(value_); }

bool Counter::wait_for(uint32_t target, std::chrono::milliseconds slice) {
  num_waiting_.fetch_add(1, std::memory_order_seq_cst);
  const uint32_t seen = value_.load(std::memory_order_seq_cst);
  // The kernel compares the word with `seen` again before it sleeps.
  if (!is_at_least(seen, target)) futex_wait(value_, seen, slice);
  // Relaxed: a waiter that is counted too long costs a wake and nothing else.
  num_waiting_.fetch_sub(1, std::memory_order_relaxed);
  return has_reached(target);
}

}  // namespace mics::shm
