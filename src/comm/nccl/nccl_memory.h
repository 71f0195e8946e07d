// NcclMemory: memory of this rank that NCCL moves without copies of its own.
//
// The runtime works in one allocation. NCCL allocates it where something is to be registered, and
// each communicator registers it once: registering again and again uses up its address space.
//
// Thread safety: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "comm/nccl/cuda_stream.h"
#include "comm/nccl/nccl_api.h"
#include "comm/nccl/nccl_handle.h"
#include "mics/nccl_options.h"

namespace mics {

class NcclMemory {
 public:
  NcclMemory(std::shared_ptr<const CudaContext> context, std::shared_ptr<NcclApi> nccl,
             const NcclOptions& options);

  // [nbytes], bytes; freed with its last tensor. Undefined when nothing is registered: torch's own
  // memory is as good. Throws CommError.
  [[nodiscard]] at::Tensor allocate(int64_t nbytes);
  // Called by each member, with memory of allocate() of the same size, while nothing is in flight
  // on the communicator. The registration ends with the returned handle, when again nothing may be
  // in flight. Null when nothing is registered. Throws CommError, TimeoutError.
  [[nodiscard]] std::shared_ptr<void> register_with(const std::shared_ptr<NcclHandle>& handle,
                                                    const at::Tensor& memory);
  // Of what allocate() gave and is not freed.
  [[nodiscard]] int64_t allocated_nbytes() const { return *allocated_nbytes_; }
  // Options that could not be honoured.
  [[nodiscard]] std::vector<std::string> notes() const;

 private:
  const std::shared_ptr<const CudaContext> context_;
  const std::shared_ptr<NcclApi> nccl_;
  const NcclRegistration asked_;
  const std::chrono::milliseconds timeout_;
  const std::string where_;  // for messages
  NcclRegistration used_;
  // Shared with the memory, which may outlive this.
  const std::shared_ptr<std::atomic<int64_t>> allocated_nbytes_ =
      std::make_shared<std::atomic<int64_t>>(0);
  // Where NCCL writes handles; in non-blocking mode also after a call that has timed out.
  std::deque<void*> registered_;
  std::vector<std::string> without_window_;  // communicators
};

}  // namespace mics
