// InFlight: the operations of one communicator that are launched and not known to be done.
//
//   begin(...)  launching...  launched()      the launching thread
//   poll(now)                                 the watchdog: marks what has started and ended
//   reclaim()                                 the launching thread: frees what has ended
//
// The watchdog frees nothing: what an operation holds may need the GIL, or wait for the device.
//
// Thread safety: one launching thread and one watchdog.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "comm/nccl/cuda_stream.h"
#include "mics/flight_log.h"

namespace mics {

struct LaunchedOperation {
  std::string what;  // "all_gather of unit \"layers.0\"", for messages
  int64_t number = 0;
  std::shared_ptr<FlightLog> log;  // may be null
  int64_t log_id = 0;
  std::shared_ptr<CUevent_st> start;
  std::shared_ptr<CUevent_st> end;
  std::function<void()> work;  // holds the tensors
  // Of the watchdog.
  bool is_launched = false;
  std::optional<std::chrono::steady_clock::time_point> first_since;  // nothing is before it
  std::optional<std::chrono::steady_clock::time_point> started_at;
  bool is_done = false;
};

class InFlight {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  // `where` as NcclHandle::where(), for messages.
  InFlight(std::shared_ptr<const CudaContext> context, std::string where)
      : context_(std::move(context)), where_(std::move(where)) {}

  // Watched from here on; address stays until it is reclaimed.
  LaunchedOperation& begin(LaunchedOperation operation);
  // Its events are recorded.
  void launched(LaunchedOperation& operation);
  void reclaim();
  // Returns when all are done and freed. Throws the world's failure, or at `deadline` TimeoutError
  // with the oldest operation.
  void drain(TimePoint deadline);
  // reclaim(), and whether nothing is left.
  [[nodiscard]] bool is_idle();
  // No operation has ever begun.
  [[nodiscard]] bool is_unused() const;
  // Of the newest operation; may be null.
  [[nodiscard]] std::shared_ptr<FlightLog> log() const;

  // What is overdue: "operation 3, all_gather of ..., has run for 600.1 s (group ...)".
  struct Overdue {
    std::string what;
    std::shared_ptr<FlightLog> log;
    int64_t log_id = 0;
  };
  // Marks what has started or ended by `now`, and returns what is overdue. Throws CommError for an
  // error of the device.
  [[nodiscard]] std::optional<Overdue> poll(TimePoint now, std::chrono::milliseconds timeout,
                                            std::chrono::milliseconds start_timeout);

 private:
  [[nodiscard]] bool has_passed(cudaEvent_t event) const;

  const std::shared_ptr<const CudaContext> context_;
  const std::string where_;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::deque<LaunchedOperation> operations_;
  bool is_unused_ = true;
  std::shared_ptr<FlightLog> log_;
};

}  // namespace mics
