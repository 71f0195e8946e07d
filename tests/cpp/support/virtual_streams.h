// VirtualClock: simulated time for ranks that are threads, and streams that run by it.
//
// Time stands still while the thread of any rank runs, and moves when all of them wait: to the next
// end of an operation on a link or of somebody's compute. What the host does takes no time. So a
// step takes the same nanoseconds on every machine, whatever else that machine does; and where
// every rank waits and nothing moves, that is an error at once and not a time-out.
//
// What is queued on a stream runs when all ranks wait, on the thread of the last one to do so, rank
// by rank and stream by stream. An operation that needs a link holds its stream until its end.
//
// A link carries one operation at a time, first come, first served: by the time at which the
// operation has become ready, that is when its stream and all members have come to it; of those
// that became ready at the same time, the one that its rank has issued first. All that happens at
// one time has happened before a free link takes its next operation.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "mics/runtime_streams.h"
#include "plan/check.h"
#include "support/multi_rank.h"

namespace mics::testing {

using Nanoseconds = std::chrono::nanoseconds;

class VirtualStream;

// One rank's end of a link.
struct VirtualLink {
  std::string name;  // no other link of the rank has it
  Nanoseconds latency;
  double nanoseconds_per_byte;
  [[nodiscard]] Nanoseconds duration(int64_t nbytes) const {
    const double rounded = nanoseconds_per_byte * static_cast<double>(nbytes) + 0.5;
    return latency + Nanoseconds(static_cast<int64_t>(rounded));
  }
};

// What a link has carried.
struct Carried {
  int rank;
  std::string link;
  std::string group;
  Nanoseconds start;
  Nanoseconds end;
  bool operator==(const Carried&) const = default;
};

class VirtualClock {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // Every rank runs until it calls leave().
  explicit VirtualClock(int num_ranks)
      : changed_(static_cast<size_t>(num_ranks)),
        num_running_(num_ranks),
        num_issued_(static_cast<size_t>(num_ranks), 0),
        waiting_(static_cast<size_t>(num_ranks)) {}

  [[nodiscard]] TimePoint now() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return TimePoint(now_);
  }
  // The thread of `rank` computes for so long.
  void compute(int rank, Nanoseconds duration) {
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_[static_cast<size_t>(rank)].until = now_ + duration;
    wait(lock, rank);
  }
  [[nodiscard]] int num_ranks() const { return static_cast<int>(waiting_.size()); }
  // The thread of a rank has ended.
  void leave() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--num_running_ == 0) move();
  }
  // In the order of their starts. While every rank has left.
  [[nodiscard]] const std::vector<Carried>& carried() const { return carried_; }

  // Called by work that is an operation: the stream that it runs on is held until carry() lets it
  // go.
  [[nodiscard]] VirtualStream& hold_running_stream();
  // The operation that holds `stream` is ready. `link` null: it is over at once.
  void carry(VirtualStream& stream, const VirtualLink* link, Nanoseconds duration,
             const std::string& group);

 private:
  friend class VirtualStream;
  friend class VirtualEvent;

  // What the thread of a rank waits for: a time or a condition.
  struct Waiting {
    std::optional<Nanoseconds> until;
    std::function<bool()> is_over;
    [[nodiscard]] bool any() const { return until.has_value() || is_over != nullptr; }
  };
  struct Operation {
    Nanoseconds ready;
    int64_t issue;  // of its rank
    Nanoseconds duration;
    VirtualStream* stream;
    std::string group;
  };
  struct Line {
    std::vector<Operation> operations;  // that are ready
    VirtualStream* busy = nullptr;      // whose operation is on the link
    Nanoseconds end{0};                 // of that operation
  };

  void wait(std::unique_lock<std::mutex>& lock, int rank) {
    Waiting& own = waiting_[static_cast<size_t>(rank)];
    if (--num_running_ == 0) move();
    changed_[static_cast<size_t>(rank)].wait(lock,
                                             [&] { return !own.any() || failure_ != nullptr; });
    if (failure_ == nullptr) return;
    if (own.any()) ++num_running_;
    own = Waiting();
    std::rethrow_exception(failure_);
  }
  // All ranks wait: goes on until one of them does not. Failures come out of every wait.
  void move() {
    if (failure_ != nullptr) return;
    try {
      while (!wake_ranks()) {
        start_operations();
        go_to_next_end();
      }
    } catch (...) {
      failure_ = std::current_exception();
      for (std::condition_variable& changed : changed_) changed.notify_one();
    }
  }
  bool wake_ranks();
  void start_operations();
  void go_to_next_end();

  mutable std::mutex mutex_;
  std::vector<std::condition_variable> changed_;  // by rank
  // Guarded by mutex_.
  Nanoseconds now_{0};
  int num_running_;
  std::vector<int64_t> num_issued_;                        // by rank
  std::vector<Waiting> waiting_;                           // by rank
  std::map<std::pair<int, int>, VirtualStream*> streams_;  // not owned; by rank and index
  std::map<std::pair<int, std::string>, Line> lines_;      // by rank and name of the link
  std::vector<Carried> carried_;
  VirtualStream* running_ = nullptr;
  std::exception_ptr failure_;
};

// An event of virtual streams. Guarded by the clock's mutex.
struct VirtualMarks {
  int64_t num_marks = 0;
  int64_t num_done = 0;
};

class VirtualEvent final : public Event {
 public:
  explicit VirtualEvent(VirtualStream& stream) : stream_(stream) {}
  // As of the last time that all ranks have waited.
  bool query() const override;
  void synchronize() override;

  // Queued work refers to them, so an event may be destroyed before it is done.
  const std::shared_ptr<VirtualMarks> marks = std::make_shared<VirtualMarks>();

 private:
  VirtualStream& stream_;  // that has made it
};

// Stream 0 of a rank is its thread, as an inline stream; the others run beside it, as worker
// streams.
class VirtualStream final : public Stream {
 public:
  VirtualStream(VirtualClock& clock, int rank, int index)
      : clock_(clock), rank_(rank), index_(index) {
    const std::lock_guard<std::mutex> lock(clock_.mutex_);
    clock_.streams_[{rank_, index_}] = this;
  }
  // Nothing is queued any more.
  ~VirtualStream() override {
    const std::lock_guard<std::mutex> lock(clock_.mutex_);
    clock_.streams_.erase({rank_, index_});
  }

  void do_enqueue(std::function<void()> work) override {
    if (is_inline()) return work();
    const std::lock_guard<std::mutex> lock(clock_.mutex_);
    push([work = std::move(work)] {
      work();
      return true;
    });
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<VirtualEvent>(*this); }
  void do_record(Event& event) override {
    const std::shared_ptr<VirtualMarks> marks = marks_of(event);
    const std::lock_guard<std::mutex> lock(clock_.mutex_);
    const int64_t mark = ++marks->num_marks;
    if (is_inline()) {
      marks->num_done = mark;
      return;
    }
    push([marks, mark] {
      marks->num_done = mark;
      return true;
    });
  }
  void do_wait(const Event& event) override {
    const std::shared_ptr<VirtualMarks> marks = marks_of(event);
    if (is_inline()) return wait_here(marks);
    const std::lock_guard<std::mutex> lock(clock_.mutex_);
    push([marks, mark = marks->num_marks] { return marks->num_done >= mark; });
  }
  void do_synchronize() override {
    const std::unique_ptr<Event> end = make_event();
    do_record(*end);
    end->synchronize();
  }
  void do_reset() override {}
  // A failure ends the simulation: it comes out of every later wait of every rank.
  bool has_failed() const override { return false; }
  std::chrono::steady_clock::time_point now() const override { return clock_.now(); }

 private:
  friend class VirtualClock;
  friend class VirtualEvent;
  struct Task {
    int64_t issue;
    std::function<bool()> run;  // false: not yet
  };

  [[nodiscard]] bool is_inline() const { return index_ == 0; }
  static const std::shared_ptr<VirtualMarks>& marks_of(const Event& event) {
    const auto* own = dynamic_cast<const VirtualEvent*>(&event);
    MICS_INTERNAL_CHECK(own != nullptr, "a virtual stream got an event of another backend.");
    return own->marks;
  }
  void push(std::function<bool()> run) {
    tasks_.push_back({clock_.num_issued_[static_cast<size_t>(rank_)]++, std::move(run)});
  }
  // The rank's thread stands still until the last mark is done.
  void wait_here(const std::shared_ptr<VirtualMarks>& marks) {
    std::unique_lock<std::mutex> lock(clock_.mutex_);
    if (marks->num_done == marks->num_marks) return;
    clock_.waiting_[static_cast<size_t>(rank_)].is_over = [marks, mark = marks->num_marks] {
      return marks->num_done >= mark;
    };
    clock_.wait(lock, rank_);
  }
  // Runs what can run now. Returns whether anything did.
  bool run() {
    bool has_run = false;
    while (!is_held_ && !tasks_.empty()) {
      issue_ = tasks_.front().issue;
      if (!tasks_.front().run()) break;
      tasks_.pop_front();
      has_run = true;
    }
    return has_run;
  }

  VirtualClock& clock_;
  const int rank_;
  const int index_;
  // Guarded by the clock's mutex.
  std::deque<Task> tasks_;
  int64_t issue_ = 0;     // of the task that runs, or that holds the stream
  bool is_held_ = false;  // by an operation
};

inline bool VirtualEvent::query() const {
  const std::lock_guard<std::mutex> lock(stream_.clock_.mutex_);
  return marks->num_done == marks->num_marks;
}

inline void VirtualEvent::synchronize() { stream_.wait_here(marks); }

inline VirtualStream& VirtualClock::hold_running_stream() {
  running_->is_held_ = true;
  return *running_;
}

inline void VirtualClock::carry(VirtualStream& stream, const VirtualLink* link,
                                Nanoseconds duration, const std::string& group) {
  if (link == nullptr || duration == Nanoseconds(0)) {
    stream.is_held_ = false;
    return;
  }
  lines_[{stream.rank_, link->name}].operations.push_back(
      {now_, stream.issue_, duration, &stream, group});
}

// Runs all that can run at this time. Returns whether any rank goes on.
inline bool VirtualClock::wake_ranks() {
  bool has_run = true;
  while (has_run) {
    has_run = false;
    for (const auto& [place, stream] : streams_) {
      running_ = stream;
      has_run = stream->run() || has_run;
    }
  }
  for (size_t rank = 0; rank < waiting_.size(); ++rank) {
    Waiting& waiting = waiting_[rank];
    const bool is_over = (waiting.until.has_value() && *waiting.until <= now_) ||
                         (waiting.is_over != nullptr && waiting.is_over());
    if (!is_over) continue;
    waiting = Waiting();
    ++num_running_;
    changed_[rank].notify_one();
  }
  const bool is_any_waiting = std::any_of(waiting_.begin(), waiting_.end(),
                                          [](const Waiting& waiting) { return waiting.any(); });
  return num_running_ > 0 || !is_any_waiting;
}

inline void VirtualClock::start_operations() {
  for (auto& [place, line] : lines_) {
    if (line.busy != nullptr || line.operations.empty()) continue;
    const auto first = std::min_element(
        line.operations.begin(), line.operations.end(), [](const auto& one, const auto& other) {
          return std::tie(one.ready, one.issue) < std::tie(other.ready, other.issue);
        });
    line.busy = first->stream;
    line.end = now_ + first->duration;
    carried_.push_back({place.first, place.second, first->group, now_, line.end});
    line.operations.erase(first);
  }
}

inline void VirtualClock::go_to_next_end() {
  std::optional<Nanoseconds> next;
  const auto consider = [&](Nanoseconds end) { next = next ? std::min(*next, end) : end; };
  for (const auto& [place, line] : lines_) {
    if (line.busy != nullptr) consider(line.end);
  }
  for (const Waiting& waiting : waiting_) {
    if (waiting.until.has_value()) consider(*waiting.until);
  }
  if (!next.has_value()) throw std::logic_error("every rank waits, and nothing moves.");
  now_ = *next;
  for (auto& [place, line] : lines_) {
    if (line.busy == nullptr || line.end > now_) continue;
    line.busy->is_held_ = false;
    line.busy = nullptr;
  }
}

// As run_ranks() for all ranks of `clock`. A rank that has ended, or thrown, keeps no other from
// going on.
inline void run_ranks(VirtualClock& clock, const std::function<void(int)>& body) {
  struct Stay {
    VirtualClock& clock;
    ~Stay() { clock.leave(); }
  };
  run_ranks(clock.num_ranks(), [&](int rank) {
    const Stay stay{clock};
    body(rank);
  });
}

inline std::shared_ptr<RuntimeStreams> make_virtual_streams(VirtualClock& clock, int rank) {
  int index = 0;
  const auto make = [&] { return std::make_unique<VirtualStream>(clock, rank, index++); };
  auto streams = std::make_shared<RuntimeStreams>();
  streams->compute = make();
  streams->gather_rail = make();
  streams->gather_intra = make();
  streams->reduce_intra = make();
  streams->reduce_rail = make();
  streams->replicate = make();
  return streams;
}

}  // namespace mics::testing
