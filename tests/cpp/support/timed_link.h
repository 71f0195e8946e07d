// TimedLink: a link that takes time, under the communicators of the local backend.
//
// An operation takes latency + received bytes / bandwidth, after all members have come to it. A
// rank's operations on one link run one after the other, first come, first served; links of
// different tiers run beside each other.
#pragma once

#include <algorithm>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "mics/communicator.h"

namespace mics::testing {

using Seconds = std::chrono::duration<double>;

// One rank's end of a link.
class TimedLink {
 public:
  TimedLink(Seconds latency, Seconds per_byte) : latency_(latency), per_byte_(per_byte) {}
  [[nodiscard]] Seconds duration(int64_t nbytes) const {
    return latency_ + per_byte_ * static_cast<double>(nbytes);
  }
  // Returns when the operation is over, with what it took from its turn on: timers are late.
  Seconds carry(int64_t nbytes) {
    using Clock = std::chrono::steady_clock;
    Clock::time_point start;
    Clock::time_point end;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      start = std::max(free_, Clock::now());
      end = free_ = start + std::chrono::duration_cast<Clock::duration>(duration(nbytes));
    }
    std::this_thread::sleep_until(end);
    return Clock::now() - start;
  }

 private:
  const Seconds latency_;
  const Seconds per_byte_;
  std::mutex mutex_;
  std::chrono::steady_clock::time_point free_;  // guarded by mutex_
};

class TimedCommunicator final : public Communicator {
 public:
  // `link` outlives it.
  TimedCommunicator(std::unique_ptr<Communicator> inner, TimedLink& link)
      : Communicator(inner->group()),
        inner_(std::move(inner)),
        link_(link),
        now_(make_inline_stream()) {}
  void barrier() override { inner_->barrier(); }
  // Of operations since forget_durations(); none: 0. Both while nothing is queued.
  [[nodiscard]] Seconds mean_duration() const {
    return num_carried_ == 0 ? Seconds(0) : carried_ / num_carried_;
  }
  void forget_durations() {
    carried_ = Seconds(0);
    num_carried_ = 0;
  }

 protected:
  Route gather_route() const override { return Route::kDirect; }
  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    inner_->all_gather(pairs, *now_);
    int64_t nbytes = 0;
    for (const TensorPair& pair : pairs) nbytes += difference(pair.output, pair.input);
    carry(nbytes);
  }
  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    inner_->reduce_scatter(pairs, *now_);
    int64_t nbytes = 0;
    for (const TensorPair& pair : pairs) nbytes += difference(pair.input, pair.output);
    carry(nbytes);
  }
  void do_all_reduce(const at::Tensor& tensor) override {
    inner_->all_reduce(tensor, *now_);
    carry(2 * static_cast<int64_t>(tensor.nbytes()) * (group().size() - 1) / group().size());
  }

 private:
  void carry(int64_t nbytes) {
    carried_ += link_.carry(nbytes);
    ++num_carried_;
  }
  static int64_t difference(const at::Tensor& larger, const at::Tensor& smaller) {
    return static_cast<int64_t>(larger.nbytes()) - static_cast<int64_t>(smaller.nbytes());
  }

  const std::unique_ptr<Communicator> inner_;
  TimedLink& link_;
  const std::unique_ptr<Stream> now_;
  Seconds carried_{0};
  int num_carried_ = 0;
};

}  // namespace mics::testing
