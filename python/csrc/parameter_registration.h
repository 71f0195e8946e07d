// ParameterRegistration: puts the full or the sharded parameters of a unit into its modules'
// `_parameters`.
//
// One call per unit; no Python code runs per parameter.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "mics/unit_parameters.h"

namespace mics {

class ParameterRegistration {
 public:
  ParameterRegistration() = default;
  ParameterRegistration(const ParameterRegistration&) = delete;
  ParameterRegistration& operator=(const ParameterRegistration&) = delete;
  // May run on a thread without the GIL.
  ~ParameterRegistration();

  // `parameters` is a module's `_parameters`. A tied parameter is added once per place. With the
  // GIL.
  void add(pybind11::dict parameters, pybind11::str key, pybind11::object sharded,
           pybind11::object full, std::string name);
  // Takes the GIL. Throws InvalidArgument when a place holds neither tensor: somebody replaced it.
  // Then all other places hold the sharded parameters.
  void apply(ParameterKind kind);

 private:
  struct Place {
    pybind11::dict parameters;
    pybind11::str key;
    pybind11::object sharded;
    pybind11::object full;
    std::string name;
  };
  std::vector<Place> places_;
};

}  // namespace mics
