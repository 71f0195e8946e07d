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
  const auto present_at = [](const Place& place) {
    return PyDict_GetItemWithError(place.parameters.ptr(), place.key.ptr());
  };
  const bool is_full = kind == ParameterKind::kFull;
  const auto swap_all = [&] {
    for (const Place& place : places_) {
      const py::object& former = is_full ? place.sharded : place.full;
      if (present_at(place) != former.ptr()) continue;
      const py::object& wanted = is_full ? place.full : place.sharded;
      if (PyDict_SetItem(place.parameters.ptr(), place.key.ptr(), wanted.ptr()) != 0) {
        throw py::error_already_set();
      }
    }
  };
  // An error leaves no mixture: the sharded ones go back in any case, the full ones come all or none.
  if (!is_full) swap_all();
  for (const Place& place : places_) {
    const PyObject* present = present_at(place);
    MICS_CHECK(present == place.sharded.ptr() || present == place.full.ptr(),
               "a sharded parameter must not be replaced: got another tensor in place of \"",
               place.name, "\". Change its values instead, with copy_() or load_state_dict().");
  }
  if (is_full) swap_all();
}

}  // namespace mics
