// CudaApi: what this library calls of the CUDA runtime and of torch's CUDA streams, behind an
// interface: filled from the libraries that torch has loaded (load_cuda), or a fake in tests.
//
// Only src/comm/nccl includes this header. Names are those of the runtime without `cuda`.
// Thread safety: any thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <cuda_runtime_api.h>

#include <functional>
#include <memory>
#include <string>

namespace mics {

class CudaApi {
 public:
  virtual ~CudaApi() = default;

  [[nodiscard]] virtual cudaError_t get_device_count(int* count) = 0;
  [[nodiscard]] virtual cudaError_t runtime_get_version(int* version) = 0;
  [[nodiscard]] virtual cudaError_t device_get_pci_bus_id(char* id, int length, int device) = 0;
  // Of the calling thread.
  [[nodiscard]] virtual cudaError_t set_device(int device) = 0;

  // Without timing. Destroying may wait for the device: never on the watchdog's thread.
  [[nodiscard]] virtual cudaError_t event_create(cudaEvent_t* event) = 0;
  [[nodiscard]] virtual cudaError_t event_destroy(cudaEvent_t event) = 0;
  [[nodiscard]] virtual cudaError_t event_record(cudaEvent_t event, cudaStream_t stream) = 0;
  // cudaErrorNotReady: work before the record is not done.
  [[nodiscard]] virtual cudaError_t event_query(cudaEvent_t event) = 0;
  [[nodiscard]] virtual cudaError_t stream_wait_event(cudaStream_t stream, cudaEvent_t event) = 0;
  [[nodiscard]] virtual cudaError_t stream_query(cudaStream_t stream) = 0;

  // Of the calling thread: whether its calls may run while another one captures a CUDA graph.
  [[nodiscard]] virtual cudaError_t thread_exchange_stream_capture_mode(
      cudaStreamCaptureMode* mode) = 0;

  [[nodiscard]] virtual std::string error_string(cudaError_t error) = 0;

  // Where tensors of `device` lie.
  [[nodiscard]] virtual c10::Device tensor_device(int device) const = 0;
  // torch's current stream on `device`, of the calling thread.
  [[nodiscard]] virtual cudaStream_t current_stream(int device) = 0;
  // A stream of torch's pool, which owns it.
  [[nodiscard]] virtual cudaStream_t pool_stream(int device, bool high_priority) = 0;
  // Runs `work`, whose kernels go to `stream`.
  virtual void run(cudaStream_t stream, int device, const std::function<void()>& work) = 0;
  // Pinned memory of the host, [nbytes] bytes. When its last tensor is gone it is used again, but
  // not before the copies from it are over.
  [[nodiscard]] virtual at::Tensor allocate_pinned(int64_t nbytes) = 0;
  // Copies memory of the host to the device, in the order of `stream`. The host waits for the copy
  // when `from` is not pinned.
  virtual void copy_from_host(const at::Tensor& to, const at::Tensor& from, cudaStream_t stream,
                              int device) = 0;
};

// The runtime that torch has loaded, else libcudart by name. Throws Error when there is none.
[[nodiscard]] std::shared_ptr<CudaApi> load_cuda();

// Throws CommError "<call> failed: <reason>".
void check_cuda(CudaApi& cuda, cudaError_t result, const char* call);

}  // namespace mics
