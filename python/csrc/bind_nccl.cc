#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/Store.hpp>

#include "bindings.h"
#include "end_without_gil.h"
#include "mics/nccl_world.h"
#include "mics/runtime_streams.h"

namespace py = pybind11;

namespace mics {

namespace {

std::shared_ptr<NcclWorld> make_world(const c10::intrusive_ptr<c10d::Store>& store, int rank,
                                      int world_size, int device, std::string host,
                                      std::chrono::milliseconds timeout,
                                      NcclRegistration registration, bool copy_engine,
                                      int max_in_flight, int max_ctas, bool is_blocking) {
  NcclOptions options;
  options.rank = rank;
  options.world_size = world_size;
  options.device = device;
  options.host = std::move(host);
  options.timeout = timeout;
  options.start_timeout = 2 * timeout;
  options.init_timeout = timeout;
  options.registration = registration;
  options.copy_engine = copy_engine;
  options.max_in_flight = max_in_flight;
  options.max_ctas = max_ctas;
  options.is_blocking = is_blocking;
  return end_without_gil(NcclWorld::create(store, options));
}

std::shared_ptr<RuntimeStreams> make_streams(NcclWorld& world) {
  return end_without_gil(std::make_shared<RuntimeStreams>(RuntimeStreams{
      world.make_current_stream(), world.make_stream(/*high_priority=*/true),
      world.make_stream(/*high_priority=*/true), world.make_stream(/*high_priority=*/true),
      world.make_stream(/*high_priority=*/true), world.make_stream(/*high_priority=*/false),
      /*frees_in_compute_order=*/true}));
}

}  // namespace

void bind_nccl(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;

  py::class_<NcclVersions>(
      module, "NcclVersions",
      "Versions of NCCL and the CUDA runtime, at build and now, and why NCCL cannot be used.")
      .def_readonly("header", &NcclVersions::header)
      .def_readonly("library", &NcclVersions::library)
      .def_readonly("cuda_header", &NcclVersions::cuda_header)
      .def_readonly("cuda_runtime", &NcclVersions::cuda_runtime)
      .def_readonly("num_devices", &NcclVersions::num_devices)
      .def_readonly("problem", &NcclVersions::problem);
  module.def("nccl_versions", &nccl_versions,
             "What is installed of NCCL and CUDA. Loads the libraries.", Release());

  py::enum_<NcclRegistration>(module, "NcclRegistration",
                              "What NCCL may do with the memory that the runtime works in.")
      .value("NONE", NcclRegistration::kNone)
      .value("BUFFERS", NcclRegistration::kBuffers)
      .value("WINDOWS", NcclRegistration::kWindows);

  py::enum_<NcclDirection>(
      module, "NcclDirection",
      "What a communicator carries; the limit in flight counts each by itself.")
      .value("GATHER", NcclDirection::kGather)
      .value("REDUCE", NcclDirection::kReduce)
      .value("REPLICATE", NcclDirection::kReplicate);

  py::class_<NcclWorld, std::shared_ptr<NcclWorld>>(
      module, "NcclWorld",
      "This rank's NCCL communicators and CUDA streams, and the watchdog over them.")
      .def(py::init(&make_world), py::arg("store"), py::kw_only(), py::arg("rank"),
           py::arg("world_size"), py::arg("device"), py::arg("host"), py::arg("timeout"),
           py::arg("registration"), py::arg("copy_engine"), py::arg("max_in_flight"),
           py::arg("max_ctas"), py::arg("is_blocking"), Release())
      .def(
          "make_communicator",
          [](NcclWorld& self, std::string name, std::vector<int> world_ranks,
             std::vector<int> nodes, int rank, NcclDirection direction, bool only_gathers) {
            return end_without_gil(std::shared_ptr<Communicator>(self.make_communicator(
                {std::move(name), std::move(world_ranks), std::move(nodes), rank}, direction,
                only_gathers)));
          },
          "Every member calls it.", py::kw_only(), py::arg("name"), py::arg("world_ranks"),
          py::arg("nodes"), py::arg("rank"), py::arg("direction"), py::arg("only_gathers"),
          Release(), py::keep_alive<0, 1>())  // so that the end of the process finds the world
      .def("make_streams", &make_streams, "The runtime's streams on this device.", Release())
      .def("close", &NcclWorld::close,
           "Waits for what is in flight and ends all communicators; before the process ends.",
           py::arg("patience"), Release())
      .def_property_readonly("allocated_nbytes", &NcclWorld::allocated_nbytes)
      .def("notes", &NcclWorld::notes, "Options that could not be honoured.", Release());
}

}  // namespace mics
