// CudaStream: a Stream of a device. Waits between streams are edges on the device. The host waits
// only in synchronize(), where it polls the device, so that a failure of the world ends the wait.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "comm/nccl/cuda_api.h"
#include "comm/nccl/event_pool.h"
#include "comm/nccl/failure.h"
#include "mics/stream.h"

namespace mics {

// What the streams of a world share.
struct CudaContext {
  std::shared_ptr<CudaApi> cuda;
  std::shared_ptr<EventPool> events;
  std::shared_ptr<Failure> failure;
  int device = 0;
};

class CudaStream final : public Stream {
 public:
  // `handle` null: torch's current stream, whatever it is at each call.
  CudaStream(std::shared_ptr<const CudaContext> context, cudaStream_t handle)
      : context_(std::move(context)), handle_(handle) {}

  [[nodiscard]] cudaStream_t handle() const;

  std::unique_ptr<Event> make_event() override;
  // Through pinned memory: the host does not wait.
  void write(const at::Tensor& to, const std::vector<int64_t>& values) override;
  bool has_failed() const override { return context_->failure->is_set(); }
  [[nodiscard]] const void* native_handle() const override { return handle(); }

 protected:
  // Runs `work` on the calling thread; what it launches goes to this stream.
  void do_enqueue(std::function<void()> work) override;
  void do_record(Event& event) override;
  void do_wait(const Event& event) override;
  void do_synchronize() override;
  // A failure of the world stays: its communicators are gone.
  void do_reset() override;

 private:
  const std::shared_ptr<const CudaContext> context_;
  const cudaStream_t handle_;
};

// Throws InternalError when `stream` is of another backend.
[[nodiscard]] CudaStream& cuda_stream_of(Stream& stream);

}  // namespace mics
