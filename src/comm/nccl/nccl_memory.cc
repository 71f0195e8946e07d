#include "comm/nccl/nccl_memory.h"

#include <ATen/ops/from_blob.h>

#include <utility>

#include "mics/error.h"
#include "plan/check.h"

namespace mics {

NcclMemory::NcclMemory(std::shared_ptr<const CudaContext> context, std::shared_ptr<NcclApi> nccl,
                       const NcclOptions& options)
    : context_(std::move(context)),
      nccl_(std::move(nccl)),
      asked_(options.registration),
      timeout_(options.init_timeout),
      where_("world_rank=" + std::to_string(options.rank)),
      used_(asked_) {
  if ((used_ == NcclRegistration::kWindows && !nccl_->has_windows()) ||
      !nccl_->has_registration()) {
    used_ = NcclRegistration::kNone;
  }
}

at::Tensor NcclMemory::allocate(int64_t nbytes) {
  if (used_ == NcclRegistration::kNone) return {};
  check_cuda(*context_->cuda, context_->cuda->set_device(context_->device), "cudaSetDevice");
  void* memory = nullptr;
  finish_call(*nccl_, nccl_->mem_alloc(&memory, static_cast<size_t>(nbytes)), nullptr,
              "ncclMemAlloc", where_, std::chrono::steady_clock::now() + timeout_);
  *allocated_nbytes_ += nbytes;
  const c10::Device device = context_->cuda->tensor_device(context_->device);
  return at::from_blob(
      memory, {nbytes},
      [nccl = nccl_, total = allocated_nbytes_, nbytes](void* freed) {
        (void)nccl->mem_free(freed);
        *total -= nbytes;
      },
      at::TensorOptions().dtype(at::kByte).device(device));
}

std::shared_ptr<void> NcclMemory::register_with(const std::shared_ptr<NcclHandle>& handle,
                                                const at::Tensor& memory) {
  if (used_ == NcclRegistration::kNone) return nullptr;
  const bool is_window = used_ == NcclRegistration::kWindows;
  const auto nbytes = static_cast<size_t>(memory.nbytes());
  void*& registered = registered_.emplace_back(nullptr);
  {
    const NcclHandle::Use use(*handle);
    MICS_INTERNAL_CHECK(use.comm() != nullptr,
                        "memory is registered with a communicator that has ended.");
    void* const data = memory.mutable_data_ptr();
    const ncclResult_t result =
        is_window ? nccl_->comm_window_register(use.comm(), data, nbytes, &registered)
                  : nccl_->comm_register(use.comm(), data, nbytes, &registered);
    handle->finish(result, is_window ? "ncclCommWindowRegister" : "ncclCommRegister",
                   std::chrono::steady_clock::now() + timeout_);
  }
  if (registered == nullptr) {
    without_window_.push_back(handle->where());
    return nullptr;
  }
  return {registered, [nccl = nccl_, handle, is_window](void* ended) {
            const NcclHandle::Use use(*handle);
            if (use.comm() == nullptr) return;  // its registrations have ended with it
            (void)(is_window ? nccl->comm_window_deregister(use.comm(), ended)
                             : nccl->comm_deregister(use.comm(), ended));
          }};
}

std::vector<std::string> NcclMemory::notes() const {
  std::vector<std::string> notes;
  if (asked_ != used_) {
    notes.push_back(std::string("registration was asked for and needs a newer NCCL (") +
                    (asked_ == NcclRegistration::kWindows ? "2.28.7 for windows" : "2.19") +
                    "): nothing is registered");
  }
  for (const std::string& name : without_window_) {
    notes.push_back("NCCL gave no window for " + name + ": its collectives use its own buffers");
  }
  return notes;
}

}  // namespace mics
