#include "mics/stream.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#include "plan/check.h"

namespace mics {

namespace {

// What an event and the streams that wait for it share. Marks are numbered; mark k is done when
// `num_done_` has reached k, because one stream completes its marks in order.
class Marks {
 public:
  // Returns the number of the new mark.
  int64_t add() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return ++num_marks_;
  }

  void complete(int64_t mark, std::exception_ptr failure) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      num_done_ = mark;
      failure_ = std::move(failure);
    }
    done_.notify_all();
  }

  [[nodiscard]] int64_t last() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return num_marks_;
  }

  [[nodiscard]] bool is_done() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return num_done_ == num_marks_;
  }

  // Blocks until `mark` is done. Returns the failure of the latest mark that is done, if any.
  [[nodiscard]] std::exception_ptr wait_for(int64_t mark) const {
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return num_done_ >= mark; });
    return failure_;
  }

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable done_;
  // Guarded by mutex_.
  int64_t num_marks_ = 0;
  int64_t num_done_ = 0;
  std::exception_ptr failure_;
};

class CpuEvent final : public Event {
 public:
  [[nodiscard]] const std::shared_ptr<Marks>& marks() const { return marks_; }
  bool query() const override { return marks_->is_done(); }
  void synchronize() override {
    if (const std::exception_ptr failure = marks_->wait_for(marks_->last())) {
      std::rethrow_exception(failure);
    }
  }

 private:
  // Queued work refers to the marks, so an event may be destroyed before it is done.
  const std::shared_ptr<Marks> marks_ = std::make_shared<Marks>();
};

const std::shared_ptr<Marks>& marks_of(const Event& event) {
  const auto* cpu_event = dynamic_cast<const CpuEvent*>(&event);
  MICS_INTERNAL_CHECK(cpu_event != nullptr, "a CPU stream got an event of another backend.");
  return cpu_event->marks();
}

class InlineStream final : public Stream {
 public:
  void do_enqueue(std::function<void()> work) override { work(); }
  std::unique_ptr<Event> make_event() override { return std::make_unique<CpuEvent>(); }
  void do_record(Event& event) override {
    const std::shared_ptr<Marks>& marks = marks_of(event);
    marks->complete(marks->add(), nullptr);
  }
  void do_wait(const Event& event) override {
    const std::shared_ptr<Marks>& marks = marks_of(event);
    if (const std::exception_ptr failure = marks->wait_for(marks->last())) {
      std::rethrow_exception(failure);
    }
  }
  void do_synchronize() override {}
  void do_reset() override {}
  bool has_failed() const override { return false; }
};

class WorkerStream final : public Stream {
 public:
  WorkerStream() : thread_([this] { run(); }) {}

  ~WorkerStream() override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void do_enqueue(std::function<void()> work) override {
    push([this, work = std::move(work)] {
      if (failure_) return;
      try {
        work();
      } catch (...) {
        fail(std::current_exception());
      }
    });
  }

  std::unique_ptr<Event> make_event() override { return std::make_unique<CpuEvent>(); }

  void do_record(Event& event) override {
    push([this, marks = marks_of(event), mark = marks_of(event)->add()] {
      marks->complete(mark, failure_);
    });
  }

  // Does not wake the thread: only work that is enqueued later needs the wait.
  void do_wait(const Event& event) override {
    append([this, marks = marks_of(event), mark = marks_of(event)->last()] {
      const std::exception_ptr failure = marks->wait_for(mark);
      if (failure && !failure_) fail(failure);
    });
  }

  void do_synchronize() override {
    CpuEvent end;
    do_record(end);
    end.synchronize();
  }

  void do_reset() override {
    CpuEvent end;
    push([this, marks = end.marks(), mark = end.marks()->add()] {
      failure_ = nullptr;
      has_failed_ = false;
      marks->complete(mark, nullptr);
    });
    end.synchronize();
  }

  bool has_failed() const override { return has_failed_; }

 private:
  void fail(std::exception_ptr failure) {
    failure_ = std::move(failure);
    has_failed_ = true;
  }

  void append(std::function<void()> task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back(std::move(task));
  }

  void push(std::function<void()> task) {
    append(std::move(task));
    changed_.notify_one();
  }

  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return is_closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      task = nullptr;  // frees what it held before the lock is taken again
      lock.lock();
    }
  }

  std::exception_ptr failure_;  // used on thread_ only
  std::atomic<bool> has_failed_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  std::deque<std::function<void()>> tasks_;
  bool is_closing_ = false;
  std::thread thread_;  // last: it uses the members above
};

// While it lives, what its thread computes belongs to `stream`.
class ObservedScope {
 public:
  ObservedScope(StreamObserver& observer, const Stream& stream) : observer_(observer) {
    observer_.on_enter(stream);
  }
  ~ObservedScope() { observer_.on_leave(); }
  ObservedScope(const ObservedScope&) = delete;
  ObservedScope& operator=(const ObservedScope&) = delete;

 private:
  StreamObserver& observer_;
};

}  // namespace

void Stream::enqueue(std::function<void()> work) {
  if (observer_ == nullptr) return do_enqueue(std::move(work));
  do_enqueue([this, observer = observer_, work = std::move(work)] {
    const ObservedScope scope(*observer, *this);
    work();
  });
}

void Stream::write(const at::Tensor& to, const std::vector<int64_t>& values) {
  const auto numel = static_cast<int64_t>(values.size());
  const bool is_on_host = to.device().is_cpu();
  // From pinned memory, which torch keeps until it is read.
  const at::Tensor from =
      is_on_host ? to
                 : at::empty({numel}, at::TensorOptions().dtype(at::kLong).pinned_memory(true));
  std::copy(values.begin(), values.end(), from.mutable_data_ptr<int64_t>());
  if (!is_on_host) to.copy_(from, /*non_blocking=*/true);
}

std::unique_ptr<Stream> make_inline_stream() { return std::make_unique<InlineStream>(); }

std::unique_ptr<Stream> make_worker_stream() { return std::make_unique<WorkerStream>(); }

}  // namespace mics
