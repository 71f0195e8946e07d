// NcclCommunicator: a Communicator whose collectives are NCCL's.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "comm/nccl/cuda_stream.h"
#include "comm/nccl/in_flight.h"
#include "comm/nccl/launch_order.h"
#include "comm/nccl/nccl_api.h"
#include "comm/nccl/nccl_handle.h"
#include "comm/nccl/nccl_memory.h"
#include "comm/nccl/nccl_watchdog.h"
#include "mics/communicator.h"

namespace mics {

class NcclCommunicator final : public Communicator {
 public:
  struct Shared {
    std::shared_ptr<const CudaContext> context;
    std::shared_ptr<NcclApi> nccl;
    std::shared_ptr<LaunchOrder> order;
    std::shared_ptr<NcclMemory> memory;
    std::chrono::milliseconds timeout;
    std::shared_ptr<NcclWatchdog> watchdog;
  };
  NcclCommunicator(GroupInfo group, Shared shared, std::shared_ptr<NcclHandle> handle,
                   std::shared_ptr<InFlight> in_flight);
  // Ends nothing: see NcclWorld.
  ~NcclCommunicator() override;
  // Gone when this is.
  [[nodiscard]] std::weak_ptr<void> life() const { return life_; }
  bool sums_in_wire_dtype() const override { return true; }

  void barrier() override;
  // Does nothing once the world has failed: polling the device would throw.
  void release_finished() override {
    if (!shared_.context->failure->is_set()) in_flight_->reclaim();
  }
  at::Tensor allocate(int64_t nbytes) override { return shared_.memory->allocate(nbytes); }
  std::shared_ptr<void> register_memory(const at::Tensor& memory) override;
  std::unique_ptr<Stream> make_caller_stream() const override {
    return std::make_unique<CudaStream>(shared_.context, nullptr);
  }

 protected:
  Route gather_route() const override { return Route::kRing; }
  Route reduce_route() const override { return Route::kRing; }
  void check_tensor(const at::Tensor& tensor) const override;
  void submit(Stream& stream, std::string_view op, std::string_view unit, int64_t nbytes,
              std::function<void()> work) override;
  void do_all_gather(const std::vector<TensorPair>& pairs) override;
  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override;
  void do_all_reduce(const at::Tensor& tensor) override;

 private:
  // One NCCL group where there are several.
  template <typename Call>
  void launch(const std::vector<TensorPair>& pairs, const char* name, const Call& call);
  [[nodiscard]] LaunchedOperation describe(std::string_view op, std::string_view unit,
                                           int64_t nbytes, std::function<void()> work);
  // Throws CommError when it cannot.
  void launch_on(Stream& stream, LaunchedOperation& operation);
  void check(ncclResult_t result, const char* call);
  void check_process() const;

  const Shared shared_;
  const std::shared_ptr<NcclHandle> handle_;
  const std::shared_ptr<InFlight> in_flight_;
  const int process_;  // that made it: communicators do not survive a fork
  const std::shared_ptr<void> life_ = std::make_shared<int>(0);
  int64_t num_launched_ = 0;
  ncclComm_t comm_ = nullptr;      // of the current launch
  cudaStream_t stream_ = nullptr;  // of the current launch
};

}  // namespace mics
