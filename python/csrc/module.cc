#include "bindings.h"
#include "mics/build_info.h"
#include "mics/error.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "C++ core of torch_mics; use the functions of torch_mics instead.";
  module.attr("version") = mics::kVersion;
  module.attr("built_for_torch") = mics::kBuiltForTorch;

  // The most general first: pybind11 tries translators in reverse order of registration.
  py::register_exception<mics::Error>(module, "Error", PyExc_RuntimeError);
  py::register_exception<mics::InvalidArgument>(module, "InvalidArgument", PyExc_ValueError);
  py::register_exception<mics::InternalError>(module, "InternalError", PyExc_RuntimeError);
  py::register_exception<mics::RaceError>(module, "RaceError", PyExc_RuntimeError);
  const auto comm_error =
      py::register_exception<mics::CommError>(module, "CommError", PyExc_RuntimeError);
  py::register_exception<mics::TimeoutError>(module, "TimeoutError", comm_error);

  mics::bind_plan(module);
  mics::bind_cost(module);
  mics::bind_comm(module);
  mics::bind_runtime(module);
  mics::bind_nccl(module);
  mics::bind_races(module);
  mics::bind_optim(module);
}
