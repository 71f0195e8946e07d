// Stream and Event: the only way to name an order of execution.
//
// A Stream runs what is queued on it in the order of queueing. Two streams are ordered only by
// events: record an Event on one, wait for it on the other. Nothing else in mics orders work, so
// on a backend that runs streams concurrently a missing edge shows as a wrong result.
//
//   gather.enqueue([&] { ... });            right: compute waits for the gather
//   gather.record(ready);
//   compute.wait(ready);
//
//   gather.enqueue([&] { ... });            wrong: compute may run before the gather
//   compute.enqueue([&] { use(result); });
//
// Thread safety: a Stream is used by one thread at a time; an Event by any.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>
#include <utility>
#include <vector>

namespace mics {

class Stream;

// Sees what streams are asked for, in the order in which the caller's threads ask. For checks; see
// mics/race_detector.h.
//
// Thread safety: any thread may call; what it throws comes out of the stream's function.
class StreamObserver {
 public:
  virtual ~StreamObserver() = default;
  // Gives what stands for the present end of `stream`; the event keeps it. `before`: what the event
  // had until now; null at first.
  [[nodiscard]] virtual std::shared_ptr<const void> on_record(
      const Stream& stream, const std::shared_ptr<const void>& before) = 0;
  // `mark`: of the event that `stream` waits for; null: never recorded.
  virtual void on_wait(const Stream& stream, const std::shared_ptr<const void>& mark) = 0;
  // The host has seen that what was before `mark` is done.
  virtual void on_passed(const std::shared_ptr<const void>& mark) = 0;
  // The host has waited until the stream was empty.
  virtual void on_synchronize(const Stream& stream) = 0;
  virtual void on_access(const Stream& stream, const at::Tensor& tensor, bool is_write,
                         std::string_view operation, std::string_view unit) = 0;
  // What the calling thread computes until on_leave() belongs to `stream`.
  virtual void on_enter(const Stream& stream) = 0;
  virtual void on_leave() noexcept = 0;
};

// A point in a stream's order. Backends derive from it; an Event is only used with streams of the
// backend that made it, and recorded on one stream only.
class Event {
 public:
  virtual ~Event() = default;
  // True when everything queued before the last record() is done or was skipped after a failure.
  // True if never recorded.
  [[nodiscard]] virtual bool query() const = 0;
  // Blocks the calling thread until query() is true. Not for the hot path.
  // Throws: the exception of failed work queued before the record.
  virtual void synchronize() = 0;

 private:
  friend class Stream;
  std::shared_ptr<const void> mark_;  // of an observer
};

class Stream {
 public:
  Stream() = default;
  virtual ~Stream() = default;
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  // Queues `work`. Returns at once, or runs it, as the backend says. What `work` refers to must
  // live until it ran.
  void enqueue(std::function<void()> work);
  [[nodiscard]] virtual std::unique_ptr<Event> make_event() = 0;
  // Marks the present end of this stream in `event`, replacing an earlier mark.
  void record(Event& event) {
    if (observer_ != nullptr) event.mark_ = observer_->on_record(*this, event.mark_);
    do_record(event);
  }
  // Work queued on this stream after the call starts only when `event`, as it is marked now, is
  // done. A failure before the mark is a failure of this stream; an inline stream throws it here.
  void wait(const Event& event) {
    if (observer_ != nullptr) observer_->on_wait(*this, event.mark_);
    do_wait(event);
  }
  // Whether the host sees that `event`, as it is marked now, is done: then what follows anywhere
  // comes after it.
  [[nodiscard]] bool has_passed(const Event& event) const {
    if (!event.query()) return false;
    if (observer_ != nullptr) observer_->on_passed(event.mark_);
    return true;
  }
  // Writes a few numbers of the host to `to` [values.size()], int64, in the order of this stream.
  // The host does not wait for a device. The base is for streams that run work on the calling
  // thread, or on torch's current stream.
  virtual void write(const at::Tensor& to, const std::vector<int64_t>& values);
  // Blocks the calling thread until the stream is empty. Not for the hot path.
  // Throws: the exception of the first failed work since the stream was made or reset.
  void synchronize() {
    do_synchronize();
    if (observer_ != nullptr) observer_->on_synchronize(*this);
  }
  // Forgets a failure, after all queued work has run or was skipped. Events marked before keep it.
  void reset() {
    do_reset();
    if (observer_ != nullptr) observer_->on_synchronize(*this);
  }
  // True when work failed since the stream was made or reset: later work is dropped.
  [[nodiscard]] virtual bool has_failed() const = 0;
  // The clock that measures how long the calling thread waits in wait(). Simulated in tests.
  [[nodiscard]] virtual std::chrono::steady_clock::time_point now() const {
    return std::chrono::steady_clock::now();
  }
  // The device's stream; null: its default stream, or there is no device.
  [[nodiscard]] virtual const void* native_handle() const { return nullptr; }

  // What the work queued next reads and writes, for an observer; `operation` of `unit`. A caller
  // notes what it queues where an observer could not see it: collectives, and work that may run on
  // a thread of the stream.
  void note_read(const at::Tensor& tensor, std::string_view operation,
                 std::string_view unit = {}) const {
    if (observer_ != nullptr) observer_->on_access(*this, tensor, false, operation, unit);
  }
  void note_write(const at::Tensor& tensor, std::string_view operation,
                  std::string_view unit = {}) const {
    if (observer_ != nullptr) observer_->on_access(*this, tensor, true, operation, unit);
  }
  // Before the first use of the stream.
  void set_observer(std::shared_ptr<StreamObserver> observer) { observer_ = std::move(observer); }

 protected:
  virtual void do_enqueue(std::function<void()> work) = 0;
  virtual void do_record(Event& event) = 0;
  virtual void do_wait(const Event& event) = 0;
  virtual void do_synchronize() = 0;
  virtual void do_reset() = 0;

 private:
  std::shared_ptr<StreamObserver> observer_;
};

// A stream that runs work in enqueue(), on the calling thread: what throws there throws out of
// enqueue(). Its record() is done at once and its wait() blocks the calling thread. The compute
// stream of a CPU is of this kind.
[[nodiscard]] std::unique_ptr<Stream> make_inline_stream();

// A stream that runs work on a thread of its own, in the order of queueing. After work that threw,
// later work is dropped without being run until reset(), and every event marked since carries the
// exception: what depends on a failed collective never runs on half of its result. Works with
// events of inline streams and of other worker streams. The destructor runs what is queued, then
// joins the thread; work that waits for an event that only the destroying thread would mark never
// ends.
[[nodiscard]] std::unique_ptr<Stream> make_worker_stream();

}  // namespace mics
