// NcclWatchdog: polls the communicators of a world, on a thread of its own, and aborts them all when
// one fails here or on another rank. Its end is theirs: the world and every communicator own it.
//
// It frees no tensor, destroys no event and never takes the GIL.
//
// Thread safety: any thread.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "comm/nccl/in_flight.h"
#include "comm/nccl/nccl_handle.h"

namespace mics {

class NcclWatchdog {
 public:
  struct Limits {
    std::chrono::milliseconds timeout;
    std::chrono::milliseconds start_timeout;
    std::chrono::milliseconds interval;
    std::chrono::milliseconds launch_patience;
  };
  // `store`: that of this session, of this thread alone.
  NcclWatchdog(std::shared_ptr<const CudaContext> context, std::shared_ptr<NcclApi> nccl,
               c10::intrusive_ptr<c10d::Store> store, int rank, Limits limits);
  // Aborts what has not been closed.
  ~NcclWatchdog();
  void stop();
  // In one NCCL group, where the library can. Waits for launches of other threads that are inside
  // NCCL, launch_patience at most; so the caller must not be in one.
  void abort_all() noexcept;

  void watch(std::shared_ptr<NcclHandle> handle, std::shared_ptr<InFlight> in_flight);
  // Makes `exception` the world's failure unless it has one, tells the other ranks, and aborts all
  // communicators. Adds the table of all ranks from `log`, which may be null.
  void fail(const std::exception_ptr& exception, FlightLog* log);

 private:
  struct Watched {
    std::shared_ptr<NcclHandle> handle;
    std::shared_ptr<InFlight> in_flight;
  };
  void run();
  void poll();
  // Aborts all when another rank has failed.
  void poll_store();
  [[nodiscard]] std::vector<Watched> watched() const;

  const std::shared_ptr<const CudaContext> context_;
  const std::shared_ptr<NcclApi> nccl_;
  const c10::intrusive_ptr<c10d::Store> store_;
  const int rank_;
  const Limits limits_;
  const int process_;  // that made it
  // Of the thread.
  std::chrono::steady_clock::time_point next_store_poll_;
  bool has_store_ended_ = false;
  mutable std::mutex mutex_;
  std::condition_variable closing_;
  // Guarded by mutex_.
  std::vector<Watched> watched_;
  bool is_closing_ = false;
  std::thread thread_;  // last: it uses the members above
};

}  // namespace mics
