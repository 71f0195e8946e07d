// Stream and Event: the only way to name an order of execution.
//
// A Stream runs what is queued on it in the order of queueing. Two streams are ordered only by
// events: record an Event on one, wait for it on the other. Nothing else in mics orders work, so a
// backend that runs streams concurrently shows a missing edge as a wrong result and not by chance
// as a right one.
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

#include <functional>
#include <memory>

namespace mics {

// A point in a stream's order. Backends derive from it; an Event is only used with streams of the
// backend that made it.
class Event {
 public:
  virtual ~Event() = default;
  // True when everything queued before the last record() is done. True if never recorded.
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
  // Work queued on this stream after the call starts only when `event` is done.
  virtual void wait(const Event& event) = 0;
  // Blocks the calling thread until the stream is empty. Not for the hot path.
  virtual void synchronize() = 0;
};

// A stream that runs work in enqueue(), on the calling thread. Everything is in program order, so
// events are always done. The compute stream of a CPU is of this kind.
[[nodiscard]] std::unique_ptr<Stream> make_inline_stream();

}  // namespace mics
