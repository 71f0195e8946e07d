// LaunchOrder: bounds the operations of a rank in flight, over the communicators of one direction, by
// edges on the device in the order of launch. Too many at once could hold all SMs while each waits
// for a peer whose kernel finds no free one. No edge joins two directions: a gather, which compute
// waits for, would wait for a replicas' sum, which nothing waits for until the step's end.
//
// Thread safety: one thread at a time.
#pragma once

#include <deque>
#include <memory>
#include <utility>

#include "comm/nccl/cuda_api.h"

namespace mics {

class LaunchOrder {
 public:
  explicit LaunchOrder(int max_in_flight) : max_in_flight_(max_in_flight) {}
  // Before a launch on `stream`.
  void order(CudaApi& cuda, cudaStream_t stream) {
    if (max_in_flight_ == 0 || static_cast<int>(launches_.size()) < max_in_flight_) return;
    const Launch& before = launches_.front();
    if (before.stream == stream) return;
    check_cuda(cuda, cuda.stream_wait_event(stream, before.end.get()), "cudaStreamWaitEvent");
  }
  // After it: `end` is recorded behind it.
  void note(cudaStream_t stream, std::shared_ptr<CUevent_st> end) {
    if (max_in_flight_ == 0) return;
    if (static_cast<int>(launches_.size()) == max_in_flight_) launches_.pop_front();
    launches_.push_back({stream, std::move(end)});
  }

 private:
  struct Launch {
    cudaStream_t stream;
    std::shared_ptr<CUevent_st> end;
  };
  const int max_in_flight_;
  std::deque<Launch> launches_;  // the last max_in_flight_
};

}  // namespace mics
