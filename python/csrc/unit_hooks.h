// UnitHooks: the forward hooks of a unit's module.
//
// The short way is C++ alone and makes no Python object: most units, in every step but the first.
// The long way is the Python functions that are given: the root, units of several modules, inputs
// that must be cast, and whatever else Python takes back by disconnect().
//
// All members are called with the GIL. It is not held while the engine waits.
#pragma once

#include <ATen/core/Tensor.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <vector>

#include "mics/engine.h"

namespace mics {

class UnitHooks {
 public:
  //   long_pre_forward   (module, args, kwargs) -> (args, kwargs)
  //   long_post_forward  (module, args, output) -> output
  //   find_tensors       (value) -> list of the tensors in a value that is no plain container
  UnitHooks(pybind11::function long_pre_forward, pybind11::function long_post_forward,
            pybind11::function find_tensors);

  // From here on the short way, for unit `unit` of `engine`. With `input_dtype`, only for inputs
  // whose floating point tensors have it.
  void connect(const std::shared_ptr<Engine>& engine, int unit,
               std::optional<at::ScalarType> input_dtype);
  void disconnect() { engine_.reset(); }

  // For register_forward_pre_hook(..., with_kwargs=True). None: the inputs are right as they are.
  pybind11::object pre_forward(const pybind11::object& module, const pybind11::tuple& args,
                               const pybind11::dict& kwargs);
  // For register_forward_hook(..., always_call=True). None: the output is right as it is.
  pybind11::object post_forward(const pybind11::object& module, const pybind11::object& args,
                                const pybind11::object& output);

 private:
  void append_tensors(pybind11::handle value, std::vector<at::Tensor>& tensors) const;

  const pybind11::function long_pre_forward_;
  const pybind11::function long_post_forward_;
  const pybind11::function find_tensors_;
  std::weak_ptr<Engine> engine_;  // empty: the long way
  int unit_ = -1;
  std::optional<at::ScalarType> input_dtype_;
};

void bind_unit_hooks(pybind11::module_& module);

}  // namespace mics
