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
#include <functional>
#include <memory>

namespace mics {

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
};

class Stream {
 public:
  virtual ~Stream() = default;
  // Queues `work`. Returns at once, or runs it, as the backend says. What `work` refers to must
  // live until it ran.
  virtual void enqueue(std::function<void()> work) = 0;
  [[nodiscard]] virtual std::unique_ptr<Event> make_event() = 0;
  // Marks the present end of this stream in `event`, replacing an earlier mark.
  virtual void record(Event& event) = 0;
  // Work queued on this stream after the call starts only when `event`, as it is marked now, is
  // done. A failure before the mark is a failure of this stream; an inline stream throws it here.
  virtual void wait(const Event& event) = 0;
  // Blocks the calling thread until the stream is empty. Not for the hot path.
  // Throws: the exception of the first failed work since the stream was made or reset.
  virtual void synchronize() = 0;
  // Forgets a failure, after all queued work has run or was skipped. Events marked before keep it.
  virtual void reset() = 0;
  // True when work failed since the stream was made or reset: later work is dropped.
  [[nodiscard]] virtual bool has_failed() const = 0;
  // The clock that measures how long the calling thread waits in wait(). Simulated in tests.
  [[nodiscard]] virtual std::chrono::steady_clock::time_point now() const {
    return std::chrono::steady_clock::now();
  }

  // What the work queued next reads and writes. Streams that run work ignore it; the recording
  // streams of tests check with it that all conflicting accesses are ordered.
  virtual void note_read(const at::Tensor& /*tensor*/) {}
  virtual void note_write(const at::Tensor& /*tensor*/) {}
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
