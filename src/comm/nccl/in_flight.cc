#include "comm/nccl/in_flight.h"

#include <thread>
#include <utility>
#include <vector>

#include "mics/error.h"
#include "plan/check.h"

namespace mics {

namespace {

double seconds(std::chrono::steady_clock::duration duration) {
  return static_cast<double>(
             std::chrono::duration_cast<std::chrono::milliseconds>(duration).count()) /
         1000;
}

}  // namespace

LaunchedOperation& InFlight::begin(LaunchedOperation operation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  is_unused_ = false;
  log_ = operation.log;
  return operations_.emplace_back(std::move(operation));
}

void InFlight::launched(LaunchedOperation& operation) {
  const std::lock_guard<std::mutex> lock(mutex_);
  operation.is_launched = true;
}

void InFlight::reclaim() {
  std::vector<LaunchedOperation> done;  // destroyed without the lock
  const std::lock_guard<std::mutex> lock(mutex_);
  while (!operations_.empty() && operations_.front().is_launched &&
         has_passed(operations_.front().end.get())) {
    LaunchedOperation& front = operations_.front();
    if (front.log != nullptr && !front.is_done) {
      if (!front.started_at) front.log->start(front.log_id);
      front.log->finish(front.log_id);
    }
    done.push_back(std::move(front));
    operations_.pop_front();
  }
}

void InFlight::drain(TimePoint deadline) {
  while (true) {
    reclaim();
    context_->failure->rethrow_if_set();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (operations_.empty()) return;
      if (std::chrono::steady_clock::now() > deadline) {
        const LaunchedOperation& oldest = operations_.front();
        throw TimeoutError(detail::concatenate(
            "collectives must end before their communicator is closed: got operation ",
            oldest.number, ", ", oldest.what, ", still in flight, and ", operations_.size() - 1,
            " after it (", where_, "). A peer has not issued it; see docs/errors.md#timeouts."));
      }
    }
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
}

bool InFlight::is_idle() {
  reclaim();
  const std::lock_guard<std::mutex> lock(mutex_);
  return operations_.empty();
}

bool InFlight::is_unused() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return is_unused_;
}

std::shared_ptr<FlightLog> InFlight::log() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return log_;
}

bool InFlight::has_passed(cudaEvent_t event) const {
  const cudaError_t result = context_->cuda->event_query(event);
  if (result == cudaErrorNotReady) return false;
  check_cuda(*context_->cuda, result, "cudaEventQuery");
  return true;
}

std::optional<InFlight::Overdue> InFlight::poll(TimePoint now, std::chrono::milliseconds timeout,
                                                std::chrono::milliseconds start_timeout) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (LaunchedOperation& operation : operations_) {
    if (operation.is_done) continue;
    if (!operation.first_since) operation.first_since = now;
    if (operation.is_launched && !operation.started_at && has_passed(operation.start.get())) {
      operation.started_at = now;
      if (operation.log != nullptr) operation.log->start(operation.log_id);
    }
    if (operation.started_at && has_passed(operation.end.get())) {
      operation.is_done = true;
      if (operation.log != nullptr) operation.log->finish(operation.log_id);
      continue;
    }
    // One communicator runs its operations one after the other: only the first can be overdue.
    const TimePoint since = operation.started_at.value_or(*operation.first_since);
    if (now - since <= (operation.started_at ? timeout : start_timeout)) return std::nullopt;
    const char* state = operation.started_at    ? ", has run for "
                        : operation.is_launched ? ", has waited to start for "
                                                : ", has been in its launch for ";
    return Overdue{detail::concatenate("operation ", operation.number, ", ", operation.what, state,
                                       seconds(now - since), " s (", where_, ")"),
                   operation.log, operation.log_id};
  }
  return std::nullopt;
}

}  // namespace mics
