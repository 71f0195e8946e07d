#include <ATen/ops/empty.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>
#include <mutex>

#include "comm/nccl/cuda_api.h"
#include "comm/nccl/library.h"
#include "mics/error.h"

namespace mics {

namespace {

c10::Device cuda_device(int device) {
  return {c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device)};
}

class LoadedCuda final : public CudaApi {
 public:
  LoadedCuda() : library_("CUDA runtime", {"libcudart.so.13", "libcudart.so.12"}) {
    library_.get(get_device_count_, "cudaGetDeviceCount");
    library_.get(runtime_get_version_, "cudaRuntimeGetVersion");
    library_.get(device_get_pci_bus_id_, "cudaDeviceGetPCIBusId");
    library_.get(set_device_, "cudaSetDevice");
    library_.get(event_create_with_flags_, "cudaEventCreateWithFlags");
    library_.get(event_destroy_, "cudaEventDestroy");
    library_.get(event_record_, "cudaEventRecord");
    library_.get(event_query_, "cudaEventQuery");
    library_.get(stream_wait_event_, "cudaStreamWaitEvent");
    library_.get(stream_query_, "cudaStreamQuery");
    library_.get(exchange_capture_mode_, "cudaThreadExchangeStreamCaptureMode");
    library_.get(get_error_string_, "cudaGetErrorString");
  }

  cudaError_t get_device_count(int* count) override { return get_device_count_(count); }
  cudaError_t runtime_get_version(int* version) override { return runtime_get_version_(version); }
  cudaError_t device_get_pci_bus_id(char* id, int length, int device) override {
    return device_get_pci_bus_id_(id, length, device);
  }
  cudaError_t set_device(int device) override { return set_device_(device); }
  cudaError_t event_create(cudaEvent_t* event) override {
    return event_create_with_flags_(event, cudaEventDisableTiming);
  }
  cudaError_t event_destroy(cudaEvent_t event) override { return event_destroy_(event); }
  cudaError_t event_record(cudaEvent_t event, cudaStream_t stream) override {
    return event_record_(event, stream);
  }
  cudaError_t event_query(cudaEvent_t event) override { return event_query_(event); }
  cudaError_t stream_wait_event(cudaStream_t stream, cudaEvent_t event) override {
    return stream_wait_event_(stream, event, 0);
  }
  cudaError_t stream_query(cudaStream_t stream) override { return stream_query_(stream); }
  cudaError_t thread_exchange_stream_capture_mode(cudaStreamCaptureMode* mode) override {
    return exchange_capture_mode_(mode);
  }
  std::string error_string(cudaError_t error) override { return get_error_string_(error); }

  c10::Device tensor_device(int device) const override { return cuda_device(device); }
  cudaStream_t current_stream(int device) override {
    return static_cast<cudaStream_t>(guard().getStream(cuda_device(device)).native_handle());
  }
  cudaStream_t pool_stream(int device, bool high_priority) override {
    const c10::Stream stream = guard().getStreamFromGlobalPool(cuda_device(device), high_priority);
    auto* const handle = static_cast<cudaStream_t>(stream.native_handle());
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_.emplace(handle, stream);
    return handle;
  }
  void run(cudaStream_t stream, int device, const std::function<void()>& work) override {
    if (stream == current_stream(device)) return work();
    const c10::StreamGuard on(pool_stream_of(stream));
    work();
  }
  at::Tensor allocate_pinned(int64_t nbytes) override {
    return at::empty({nbytes}, at::TensorOptions().dtype(at::kByte).pinned_memory(true));
  }
  void copy_from_host(const at::Tensor& to, const at::Tensor& from, cudaStream_t stream,
                      int device) override {
    run(stream, device, [&] { to.copy_(from, /*non_blocking=*/true); });
  }

 private:
  // Made when used: a torch without CUDA has none, and its error says so.
  [[nodiscard]] static c10::impl::VirtualGuardImpl guard() {
    return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA);
  }
  [[nodiscard]] c10::Stream pool_stream_of(cudaStream_t stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = pool_.find(stream);
    if (found == pool_.end()) throw InternalError("internal error: an unknown CUDA stream.");
    return found->second;
  }

  const Library library_;
  decltype(&cudaGetDeviceCount) get_device_count_ = nullptr;
  decltype(&cudaRuntimeGetVersion) runtime_get_version_ = nullptr;
  decltype(&cudaDeviceGetPCIBusId) device_get_pci_bus_id_ = nullptr;
  decltype(&cudaSetDevice) set_device_ = nullptr;
  // Spelled out, because the header overloads it in C++.
  cudaError_t (*event_create_with_flags_)(cudaEvent_t*, unsigned int) = nullptr;
  decltype(&cudaEventDestroy) event_destroy_ = nullptr;
  cudaError_t (*event_record_)(cudaEvent_t, cudaStream_t) = nullptr;
  decltype(&cudaEventQuery) event_query_ = nullptr;
  cudaError_t (*stream_wait_event_)(cudaStream_t, cudaEvent_t, unsigned int) = nullptr;
  decltype(&cudaStreamQuery) stream_query_ = nullptr;
  decltype(&cudaThreadExchangeStreamCaptureMode) exchange_capture_mode_ = nullptr;
  decltype(&cudaGetErrorString) get_error_string_ = nullptr;
  std::mutex mutex_;
  std::map<cudaStream_t, c10::Stream> pool_;  // guarded by mutex_
};

}  // namespace

std::shared_ptr<CudaApi> load_cuda() { return std::make_shared<LoadedCuda>(); }

void check_cuda(CudaApi& cuda, cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  throw CommError(std::string(call) + " failed: " + cuda.error_string(result) +
                  ". Run with CUDA_LAUNCH_BLOCKING=1 to find the kernel.");
}

}  // namespace mics
