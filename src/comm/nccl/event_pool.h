// EventPool: recycles CUDA events, because making or destroying one may wait for the device.
//
// Thread safety: any thread. Events may outlive the pool's owner: each holds the pool.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "comm/nccl/cuda_api.h"

namespace mics {

class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  explicit EventPool(std::shared_ptr<CudaApi> cuda) : cuda_(std::move(cuda)) {}
  ~EventPool() {
    // At the end of a process the device may be gone before us; then there is nothing to free.
    for (cudaEvent_t event : free_) (void)cuda_->event_destroy(event);
  }
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  // Goes back to the pool with its last owner. What waits for it on a stream is not disturbed: a
  // wait is for the record that was there when it was queued.
  [[nodiscard]] std::shared_ptr<CUevent_st> take() {
    cudaEvent_t event = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        event = free_.back();
        free_.pop_back();
      }
    }
    if (event == nullptr) check_cuda(*cuda_, cuda_->event_create(&event), "cudaEventCreate");
    return {event, [pool = shared_from_this()](cudaEvent_t freed) {
              const std::lock_guard<std::mutex> lock(pool->mutex_);
              pool->free_.push_back(freed);
            }};
  }

 private:
  const std::shared_ptr<CudaApi> cuda_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_;  // guarded by mutex_
};

}  // namespace mics
