#include "comm/nccl/cuda_stream.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "plan/check.h"

namespace mics {

namespace {

// How long reset() waits for the work of a world that has failed.
constexpr std::chrono::seconds kDrainLimit{10};

// Polls `query` until it is not cudaErrorNotReady or `give_up` is true, at growing intervals.
template <typename Query, typename GiveUp>
cudaError_t poll(const Query& query, const GiveUp& give_up) {
  std::chrono::microseconds pause{10};
  while (true) {
    const cudaError_t result = query();
    if (result != cudaErrorNotReady || give_up()) return result;
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::microseconds(1000));
  }
}

class CudaEvent final : public Event {
 public:
  explicit CudaEvent(std::shared_ptr<const CudaContext> context)
      : context_(std::move(context)), event_(context_->events->take()) {}

  [[nodiscard]] cudaEvent_t handle() const { return event_.get(); }

  bool query() const override {
    const cudaError_t result = context_->cuda->event_query(event_.get());
    if (result == cudaErrorNotReady) return false;
    check_cuda(*context_->cuda, result, "cudaEventQuery");
    return true;
  }

  void synchronize() override {
    const cudaError_t result = poll([this] { return context_->cuda->event_query(event_.get()); },
                                    [this] { return context_->failure->is_set(); });
    context_->failure->rethrow_if_set();
    check_cuda(*context_->cuda, result, "cudaEventQuery");
  }

 private:
  const std::shared_ptr<const CudaContext> context_;
  const std::shared_ptr<CUevent_st> event_;
};

cudaEvent_t handle_of(const Event& event) {
  const auto* cuda_event = dynamic_cast<const CudaEvent*>(&event);
  MICS_INTERNAL_CHECK(cuda_event != nullptr, "a CUDA stream got an event of another backend.");
  return cuda_event->handle();
}

}  // namespace

CudaStream& cuda_stream_of(Stream& stream) {
  auto* cuda_stream = dynamic_cast<CudaStream*>(&stream);
  MICS_INTERNAL_CHECK(cuda_stream != nullptr, "NCCL got a stream of another backend.");
  return *cuda_stream;
}

cudaStream_t CudaStream::handle() const {
  return handle_ != nullptr ? handle_ : context_->cuda->current_stream(context_->device);
}

void CudaStream::do_enqueue(std::function<void()> work) {
  context_->cuda->run(handle(), context_->device, work);
}

std::unique_ptr<Event> CudaStream::make_event() { return std::make_unique<CudaEvent>(context_); }

void CudaStream::do_record(Event& event) {
  check_cuda(*context_->cuda, context_->cuda->event_record(handle_of(event), handle()),
             "cudaEventRecord");
}

void CudaStream::do_wait(const Event& event) {
  context_->failure->rethrow_if_set();
  check_cuda(*context_->cuda, context_->cuda->stream_wait_event(handle(), handle_of(event)),
             "cudaStreamWaitEvent");
}

void CudaStream::write(const at::Tensor& to, const std::vector<int64_t>& values) {
  const auto nbytes = static_cast<int64_t>(values.size() * sizeof(int64_t));
  const at::Tensor pinned = context_->cuda->allocate_pinned(nbytes).view(at::kLong);
  std::copy(values.begin(), values.end(), pinned.mutable_data_ptr<int64_t>());
  context_->cuda->copy_from_host(to, pinned, handle(), context_->device);
}

void CudaStream::do_synchronize() {
  const cudaError_t result = poll([this] { return context_->cuda->stream_query(handle()); },
                                  [this] { return context_->failure->is_set(); });
  context_->failure->rethrow_if_set();
  check_cuda(*context_->cuda, result, "cudaStreamQuery");
}

void CudaStream::do_reset() {
  const auto limit = std::chrono::steady_clock::now() + kDrainLimit;
  const cudaError_t result =
      poll([this] { return context_->cuda->stream_query(handle()); },
           [this, limit] {
             return context_->failure->is_set() && std::chrono::steady_clock::now() > limit;
           });
  if (!context_->failure->is_set()) check_cuda(*context_->cuda, result, "cudaStreamQuery");
}

}  // namespace mics
