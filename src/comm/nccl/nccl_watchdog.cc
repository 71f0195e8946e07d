#include "comm/nccl/nccl_watchdog.h"

#include <unistd.h>

#include <algorithm>
#include <utility>

#include "mics/error.h"

namespace mics {

namespace {

// How often a rank polls the Store for the failure of another.
constexpr std::chrono::milliseconds kStoreInterval{500};
constexpr char kFailureKey[] = "failure";

std::exception_ptr with_report(const std::exception_ptr& exception, FlightLog* log) {
  if (log == nullptr) return exception;
  const std::string report = "\n" + log->report_failure();
  try {
    std::rethrow_exception(exception);
  } catch (const TimeoutError& error) {
    return std::make_exception_ptr(TimeoutError(error.what() + report));
  } catch (const CommError& error) {
    return std::make_exception_ptr(CommError(error.what() + report));
  } catch (...) {
    return exception;
  }
}

std::string text_of(const std::exception_ptr& exception) {
  try {
    std::rethrow_exception(exception);
  } catch (const std::exception& error) {
    return error.what();
  } catch (...) {
    return "an unknown exception";
  }
}

}  // namespace

NcclWatchdog::NcclWatchdog(std::shared_ptr<const CudaContext> context,
                           std::shared_ptr<NcclApi> nccl, c10::intrusive_ptr<c10d::Store> store,
                           int rank, Limits limits)
    : context_(std::move(context)),
      nccl_(std::move(nccl)),
      store_(std::move(store)),
      rank_(rank),
      limits_(limits),
      process_(getpid()),
      next_store_poll_(std::chrono::steady_clock::now() + kStoreInterval),
      thread_([this] { run(); }) {}

NcclWatchdog::~NcclWatchdog() {
  stop();
  if (process_ == getpid()) abort_all();
}

void NcclWatchdog::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    is_closing_ = true;
  }
  closing_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void NcclWatchdog::watch(std::shared_ptr<NcclHandle> handle, std::shared_ptr<InFlight> in_flight) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(watched_, [](const Watched& other) { return !other.handle->is_open(); });
  watched_.push_back({std::move(handle), std::move(in_flight)});
}

std::vector<NcclWatchdog::Watched> NcclWatchdog::watched() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return watched_;
}

void NcclWatchdog::abort_all() noexcept {
  std::vector<std::shared_ptr<NcclHandle>> handles;
  for (const Watched& one : watched()) handles.push_back(one.handle);
  abort_together(*nccl_, handles, limits_.launch_patience);
}

void NcclWatchdog::fail(const std::exception_ptr& exception, FlightLog* log) {
  if (context_->failure->is_set()) return abort_all();
  const std::exception_ptr reported = with_report(exception, log);
  if (context_->failure->set(reported)) {
    try {
      store_->set(kFailureKey, "world_rank " + std::to_string(rank_) + ": " + text_of(exception));
    } catch (...) {  // the Store has ended: other ranks find out by themselves
    }
  }
  abort_all();
}

void NcclWatchdog::run() {
  // Queries of events would end a CUDA graph that the caller captures.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  (void)context_->cuda->thread_exchange_stream_capture_mode(&mode);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!closing_.wait_for(lock, limits_.interval, [this] { return is_closing_; })) {
    lock.unlock();
    if (!context_->failure->is_set()) poll();
    lock.lock();
  }
}

void NcclWatchdog::poll() {
  try {
    const auto now = std::chrono::steady_clock::now();
    for (const Watched& one : watched()) {
      const std::string error = one.handle->async_error();
      const std::optional<InFlight::Overdue> overdue =
          one.in_flight->poll(now, limits_.timeout, limits_.start_timeout);
      if (!error.empty()) {
        const std::shared_ptr<FlightLog> log = one.in_flight->log();
        return fail(std::make_exception_ptr(CommError(
                        "NCCL reported an error in " + one.handle->where() + ": " + error +
                        ". Look at the first rank that failed; NCCL_DEBUG=WARN says more.")),
                    log.get());
      }
      if (overdue) {
        if (overdue->log != nullptr) overdue->log->fail(overdue->log_id);
        return fail(std::make_exception_ptr(TimeoutError(
                        "every member of a group must issue the same collectives in time: " +
                        overdue->what + ". See docs/errors.md#timeouts.")),
                    overdue->log.get());
      }
    }
    if (has_store_ended_ || now < next_store_poll_) return;
    next_store_poll_ = now + std::max(kStoreInterval, limits_.interval);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    return fail(
        std::make_exception_ptr(CommError("the watchdog must reach the device: got \"" + text +
                                          "\" (world_rank=" + std::to_string(rank_) + ").")),
        nullptr);
  }
  poll_store();
}

void NcclWatchdog::poll_store() {
  try {
    if (!store_->check({kFailureKey})) return;
    fail(std::make_exception_ptr(
             CommError("another rank's collective failed, which ended those of all: " +
                       store_->get_to_str(kFailureKey))),
         nullptr);
  } catch (const std::exception&) {
    has_store_ended_ = true;  // torch.distributed has ended; failures of this rank are still seen
  }
}

}  // namespace mics
