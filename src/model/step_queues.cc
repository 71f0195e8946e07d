#include "model/step_queues.h"

#include <algorithm>
#include <map>

#include "plan/check.h"

namespace mics {
namespace {

enum class Kind { kGatherRail, kGatherIntra, kReduceIntra, kReduceRail, kReplicate };

struct Task {
  Kind kind;
  size_t operation;
  double seconds;
};

// First come, first served, one at a time.
struct Queue {
  std::vector<Task> tasks;
  size_t next = 0;       // index of the next task to take
  Task running{};        // if is_busy
  double remaining = 0;  // seconds of `running` at full speed
  bool is_busy = false;
};

class Simulation {
 public:
  Simulation(const std::vector<StepOperation>& operations, const QueueOptions& options)
      : operations_(operations), options_(options), gathered_(operations.size(), kNothing) {
    times_.compute_ends.resize(operations.size());
    note_earlier_uses();
    times_.busy_at_ends.resize(operations.size());
    network_.tasks.reserve(3 * operations.size());
    intra_.tasks.reserve(2 * operations.size());
  }

  QueueTimes run() {
    issue_gathers(0, options_.prefetch_rail, options_.prefetch_intra);
    while (true) {
      start_compute();
      start(network_);
      start(intra_);
      if (!compute_busy_ && !network_.is_busy && !intra_.is_busy) break;
      advance();
    }
    MICS_INTERNAL_CHECK(next_compute_ == operations_.size(), "a step ended early");
    times_.total = now_;
    return std::move(times_);
  }

 private:
  enum : char { kNothing, kQueued, kRail, kAll };  // how far an operation's gather is

  void push(Kind kind, size_t operation, double seconds, bool is_intra) {
    if (seconds <= 0) {
      finish(kind, operation);
    } else {
      (is_intra ? intra_ : network_).tasks.push_back({kind, operation, seconds});
    }
  }

  [[nodiscard]] bool gathers(size_t i) const {
    return operations_[i].gather_rail > 0 || operations_[i].gather_intra > 0;
  }

  void note_earlier_uses() {
    free_after_.resize(operations_.size(), 0);
    std::map<int, size_t> ends;  // by unit: operations up to its last use
    for (size_t i = 0; i < operations_.size(); ++i) {
      const int unit = operations_[i].unit;
      if (unit < 0) continue;
      if (gathers(i)) free_after_[i] = ends[unit];
      ends[unit] = i + 1;
    }
  }

  // The end of the operations whose gathers may be queued with `prefetch` ahead of `operation`.
  [[nodiscard]] size_t limit(size_t operation, int prefetch) const {
    size_t last = operation + 1;
    for (; last < operations_.size(); ++last) {
      if (options_.as_engine && !gathers(last)) continue;
      if (prefetch-- == 0) break;
    }
    return std::min(last, operations_.size());
  }

  // Queues what may be gathered when `operation` starts; without prefetch, when the last one ends.
  void issue_gathers(size_t operation, int prefetch_rail, int prefetch_intra) {
    intra_limit_ = std::max(intra_limit_, limit(operation, prefetch_intra));
    const size_t rail_limit = limit(operation, prefetch_rail);
    for (size_t i = next_rail_; i < rail_limit; ++i) {
      // A gather whose unit is in use is passed over until the unit is free.
      if (gathered_[i] != kNothing || free_after_[i] > next_compute_) continue;
      gathered_[i] = kQueued;
      push(Kind::kGatherRail, i, operations_[i].gather_rail, false);
    }
    while (next_rail_ < rail_limit && gathered_[next_rail_] != kNothing) ++next_rail_;
    issue_second_hops();
  }

  void issue_second_hops() {
    while (next_intra_ < intra_limit_ && gathered_[next_intra_] == kRail) {
      const size_t i = next_intra_++;
      push(Kind::kGatherIntra, i, operations_[i].gather_intra, true);
    }
  }

  void finish(Kind kind, size_t i) {
    const StepOperation& operation = operations_[i];
    switch (kind) {
      case Kind::kGatherRail:
        gathered_[i] = kRail;
        issue_second_hops();
        break;
      case Kind::kGatherIntra:
        gathered_[i] = kAll;
        break;
      case Kind::kReduceIntra:
        push(Kind::kReduceRail, i, operation.reduce_rail, false);
        break;
      case Kind::kReduceRail:
        push(Kind::kReplicate, i, operation.replicate, operation.replicate_is_intra);
        break;
      case Kind::kReplicate:
        break;
    }
  }

  void start_compute() {
    if (compute_busy_ || next_compute_ == operations_.size()) return;
    if (gathered_[next_compute_] != kAll) return;
    compute_busy_ = true;
    compute_remaining_ = operations_[next_compute_].compute;
    issue_gathers(next_compute_, options_.prefetch_rail, options_.prefetch_intra);
  }

  static void start(Queue& queue) {
    if (queue.is_busy || queue.next == queue.tasks.size()) return;
    queue.running = queue.tasks[queue.next++];
    queue.remaining = queue.running.seconds;
    queue.is_busy = true;
  }

  // Advances the clock to the next end of anything that runs.
  void advance() {
    const Contention& contention = options_.contention;
    const double slow_compute = 1 + (network_.is_busy ? contention.compute_by_network : 0) +
                                (intra_.is_busy ? contention.compute_by_intra : 0);
    const double slow_network = 1 + (compute_busy_ ? contention.network_by_compute : 0);
    double step = -1;
    const auto consider = [&](bool is_busy, double seconds) {
      if (is_busy && (step < 0 || seconds < step)) step = seconds;
    };
    consider(compute_busy_, compute_remaining_ * slow_compute);
    consider(network_.is_busy, network_.remaining * slow_network);
    consider(intra_.is_busy, intra_.remaining);
    now_ += step;
    if (compute_busy_) times_.compute_busy += step;
    // What determines the step ends exactly; a rounding error left in others is not work.
    const auto is_over = [&](double& remaining, double slow) {
      const bool ends = remaining * slow <= step;
      remaining = ends ? 0 : remaining - step / slow;
      return ends;
    };
    const bool network_ends = network_.is_busy && is_over(network_.remaining, slow_network);
    const bool intra_ends = intra_.is_busy && is_over(intra_.remaining, 1);
    const bool compute_ends = compute_busy_ && is_over(compute_remaining_, slow_compute);
    if (network_ends) end(network_);
    if (intra_ends) end(intra_);
    if (compute_ends) {
      const size_t i = next_compute_++;
      compute_busy_ = false;
      times_.compute_ends[i] = now_;
      times_.busy_at_ends[i] = times_.compute_busy;
      push(Kind::kReduceIntra, i, operations_[i].reduce_intra, true);
      issue_gathers(next_compute_, options_.as_engine ? options_.prefetch_rail : 0,
                    options_.as_engine ? options_.prefetch_intra : 0);
    }
  }

  void end(Queue& queue) {
    queue.is_busy = false;
    finish(queue.running.kind, queue.running.operation);
  }

  const std::vector<StepOperation>& operations_;
  const QueueOptions& options_;
  std::vector<char> gathered_;
  std::vector<size_t> free_after_;  // by operation: its unit is free when so many have ended
  Queue network_;
  Queue intra_;
  size_t next_rail_ = 0;  // those before it are queued
  size_t next_intra_ = 0;
  size_t intra_limit_ = 0;
  size_t next_compute_ = 0;
  double compute_remaining_ = 0;
  bool compute_busy_ = false;
  double now_ = 0;
  QueueTimes times_;
};

}  // namespace

QueueTimes run_queues(const std::vector<StepOperation>& operations, const QueueOptions& options) {
  return Simulation(operations, options).run();
}

}  // namespace mics
