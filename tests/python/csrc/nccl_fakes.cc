// Python tests' door to the fakes: worlds of NCCL whose ranks are processes of this host, for the
// wrapper to train on. The world is the production one; CUDA and NCCL are fakes.
#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <chrono>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

#include "mics/nccl_world.h"
#include "mics/race_detector.h"
#include "support/fake_cuda.h"
#include "support/fake_nccl.h"
#include "support/poisoned_memory.h"
#include "support/shm_network.h"

namespace py = pybind11;

namespace mics::testing {
namespace {

// What lies below one rank's world.
class FakeDevice {
 public:
  // `seed`: of random delays of every stream; 0: none. `sums_in_fp32`: not as NCCL, but as the other
  // backends. `device`: of the tensors.
  FakeDevice(int rank, unsigned seed, bool sums_in_fp32, const std::string& device)
      : rank_(rank),
        cuda_(std::make_shared<FakeCuda>("0000:00:" + std::to_string(rank), seed)),
        nccl_(std::make_shared<FakeNccl>(network_, cuda_)) {
    network_->sums_in_fp32 = sums_in_fp32;
    cuda_->set_tensor_device(c10::Device(device));
  }

  std::shared_ptr<NcclWorld> make_world(const c10::intrusive_ptr<c10d::Store>& store,
                                        int world_size, NcclRegistration registration,
                                        bool copy_engine) {
    NcclOptions options;
    options.rank = rank_;
    options.world_size = world_size;
    options.host = "host";
    options.timeout = std::chrono::seconds(60);
    options.start_timeout = std::chrono::seconds(60);
    options.init_timeout = std::chrono::seconds(60);
    options.registration = registration;
    options.copy_engine = copy_engine;
    return NcclWorld::create(store, options, cuda_, nccl_);
  }
  // See FakeCuda.
  void run_at_once() { cuda_->run_at_once(); }
  // Calls since the last time, by name.
  std::map<std::string, int> take_counts() {
    std::map<std::string, int> counts = cuda_->take_counts();
    counts.merge(nccl_->take_counts());
    return counts;
  }
  std::vector<std::string> faults() const { return network_->faults(); }
  int num_live_communicators() const { return network_->num_live_comms; }
  int num_live_events() const { return cuda_->num_live_events(); }
  int num_held() const { return nccl_->num_held(); }

 private:
  const int rank_;
  const std::shared_ptr<FakeNetwork> network_ = std::make_shared<ShmNetwork>();
  const std::shared_ptr<FakeCuda> cuda_;
  const std::shared_ptr<FakeNccl> nccl_;
};

}  // namespace
}  // namespace mics::testing

PYBIND11_MODULE(nccl_fakes, module) {
  using mics::testing::FakeDevice;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::module_::import("torch_mics._C");  // has the types of what is given and returned

  py::class_<FakeDevice, std::shared_ptr<FakeDevice>>(module, "FakeDevice")
      .def(py::init<int, unsigned, bool, const std::string&>(), py::arg("rank"), py::arg("seed"),
           py::kw_only(), py::arg("sums_in_fp32"), py::arg("device") = "cpu", Release())
      .def("make_world", &FakeDevice::make_world, py::arg("store"), py::kw_only(),
           py::arg("world_size"), py::arg("registration"), py::arg("copy_engine"), Release())
      .def("run_at_once", &FakeDevice::run_at_once)
      .def("take_counts", &FakeDevice::take_counts)
      .def_property_readonly("faults", &FakeDevice::faults)
      .def_property_readonly("num_live_communicators", &FakeDevice::num_live_communicators)
      .def_property_readonly("num_live_events", &FakeDevice::num_live_events)
      .def_property_readonly("num_held", &FakeDevice::num_held);

  // From here on, in this process.
  module.def("poison_memory", [] { (void)new mics::testing::PoisonedMemory(); });
  // Tells `detector` of all memory of this process that poison_memory() gives out; null: nobody.
  module.def(
      "watch_memory",
      [](std::shared_ptr<mics::RaceDetector> detector) {
        if (detector == nullptr) return mics::testing::PoisoningAllocator::watch(nullptr);
        mics::testing::PoisoningAllocator::watch(
            [detector = std::move(detector)](void* data, size_t nbytes, bool is_given_out) {
              const auto address = reinterpret_cast<uintptr_t>(data);
              if (!is_given_out) return detector->free(address);
              detector->allocate(address, static_cast<int64_t>(nbytes), std::nullopt);
            });
      },
      py::arg("detector").none(true));
}
