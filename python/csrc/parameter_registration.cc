#include "parameter_registration.h"

#include <utility>

#include "plan/check.h"

namespace py = pybind11;

namespace mics {

ParameterRegistration::~ParameterRegistration() {
  const py::gil_scoped_acquire gil;
  places_.clear();
}

void ParameterRegistration::add(py::dict parameters, py::str key, py::object sharded,
                                py::object full, std::string name) {
  places_.push_back({std::move(parameters), std::move(key), std::move(sharded), std::move(full),
                     std::move(name)});
}

void ParameterRegistration::apply(ParameterKind kind) {
  const py::gil_scoped_acquire gil;
  for (const Place& place : places_) {
    const PyObject* present = PyDict_GetItemWithError(place.parameters.ptr(), place.key.ptr());
    MICS_CHECK(present == place.sharded.ptr() || present == place.full.ptr(),
               "a sharded parameter must not be replaced: got another tensor in place of \"",
               place.name, "\". Change its values instead, with copy_() or load_state_dict().");
    const py::object& wanted = kind == ParameterKind::kFull ? place.full : place.sharded;
    if (present == wanted.ptr()) continue;
    if (PyDict_SetItem(place.parameters.ptr(), place.key.ptr(), wanted.ptr()) != 0) {
      throw py::error_already_set();
    }
  }
}

}  // namespace mics
