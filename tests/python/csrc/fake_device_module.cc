// The door of Python tests to the fake device, and the collectives of its tensors for torch's process
// groups: those of another backend, on the same memory.
#include <pybind11/stl.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <utility>
#include <vector>

#include "fake_device.h"

namespace py = pybind11;

namespace mics::testing {
namespace {

using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
using WorkPtr = c10::intrusive_ptr<c10d::Work>;

Tensors on_host(const Tensors& tensors) {
  Tensors aliases;
  for (const at::Tensor& tensor : tensors) aliases.push_back(host_alias(tensor));
  return aliases;
}

Lists on_host(const Lists& lists) {
  Lists aliases;
  for (const Tensors& tensors : lists) aliases.push_back(on_host(tensors));
  return aliases;
}

class HostBackend final : public c10d::Backend {
 public:
  explicit HostBackend(c10::intrusive_ptr<c10d::Backend> inner)
      : Backend(inner->getRank(), inner->getSize()), inner_(std::move(inner)) {}

  const std::string getBackendName() const override { return "fake_device"; }
  c10::intrusive_ptr<Options> getBackendOptions() override { return inner_->getBackendOptions(); }
  void setTimeout(std::chrono::milliseconds timeout) override { inner_->setTimeout(timeout); }
  void setSequenceNumberForGroup() override { inner_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return inner_->getSequenceNumberForGroup(); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    Tensors host = on_host(tensors);
    return inner_->broadcast(host, options);
  }
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    Tensors host = on_host(tensors);
    return inner_->allreduce(host, options);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    Tensors host = on_host(tensors);
    return inner_->reduce(host, options);
  }
  WorkPtr allgather(Lists& outputs, Tensors& inputs,
                    const c10d::AllgatherOptions& options) override {
    Lists to = on_host(outputs);
    Tensors from = on_host(inputs);
    return inner_->allgather(to, from, options);
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input,
                          const c10d::AllgatherOptions& options) override {
    at::Tensor to = host_alias(output);
    at::Tensor from = host_alias(input);
    return inner_->_allgather_base(to, from, options);
  }
  WorkPtr gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    Lists to = on_host(outputs);
    Tensors from = on_host(inputs);
    return inner_->gather(to, from, options);
  }
  WorkPtr scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override {
    Tensors to = on_host(outputs);
    Lists from = on_host(inputs);
    return inner_->scatter(to, from, options);
  }
  WorkPtr reduce_scatter(Tensors& outputs, Lists& inputs,
                         const c10d::ReduceScatterOptions& options) override {
    Tensors to = on_host(outputs);
    Lists from = on_host(inputs);
    return inner_->reduce_scatter(to, from, options);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    at::Tensor to = host_alias(output);
    at::Tensor from = host_alias(input);
    return inner_->_reduce_scatter_base(to, from, options);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors,
                              const c10d::AllreduceCoalescedOptions& options) override {
    Tensors host = on_host(tensors);
    return inner_->allreduce_coalesced(host, options);
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    Tensors to = on_host(outputs);
    Tensors from = on_host(inputs);
    return inner_->allgather_into_tensor_coalesced(to, from, options);
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    Tensors to = on_host(outputs);
    Tensors from = on_host(inputs);
    return inner_->reduce_scatter_tensor_coalesced(to, from, options);
  }
  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& to_sizes,
                        std::vector<int64_t>& from_sizes,
                        const c10d::AllToAllOptions& options) override {
    at::Tensor to = host_alias(output);
    at::Tensor from = host_alias(input);
    return inner_->alltoall_base(to, from, to_sizes, from_sizes, options);
  }
  WorkPtr barrier(const c10d::BarrierOptions& options) override { return inner_->barrier(options); }

 private:
  c10::intrusive_ptr<c10d::Backend> inner_;
};

}  // namespace
}  // namespace mics::testing

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace mics::testing;
  m.def("num_devices", [] { return static_cast<int>(kNumFakeDevices); });
  m.def("current_device", [] { return static_cast<int>(current_fake_device()); });
  m.def("set_device", [](int i) { set_current_fake_device(static_cast<c10::DeviceIndex>(i)); });
  m.def("default_generator",
        [](int i) { return default_fake_generator(static_cast<c10::DeviceIndex>(i)); });
  m.def("allocated_nbytes", [] { return fake_device_bytes().allocated; });
  m.def("peak_nbytes", [] { return fake_device_bytes().peak; });
  m.def("reset_peak", &reset_fake_device_peak);
  m.def("take_host_reads", &take_host_reads);
  m.def("host_alias", [](const at::Tensor& tensor) { return host_alias(tensor); });
  m.def("over_host", [](const c10::intrusive_ptr<c10d::Backend>& inner) {
    return c10::intrusive_ptr<c10d::Backend>(c10::make_intrusive<HostBackend>(inner));
  });
}
