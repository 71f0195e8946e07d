// UnitHooks: the forward hooks of a unit's module.
//
// The short way is C++ alone and makes no Python object: most units, in every step but the first.
// The long way is the Python functions that are given: the outermost forward, units of several
// modules, inputs that must be cast, and whatever else Python takes back by disconnect().
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
  //   find_tensors       (output) -> list of its tensors, for outputs that are no plain containers
  UnitHooks(pybind11::function long_pre_forward, pybind11::function long_post_forward,
            pybind11::function find_tensors);

  // From here on the short way, for `units` of `engine`, which are gathered together. With
  // `input_dtype`, only for inputs whose floating point tensors have it.
  void connect(const std::shared_ptr<Engine>& engine, std::vector<int> units,
               std::optional<at::ScalarType> input_dtype);
  void disconnect() { engine_.reset(); }

  // For register_forward_pre_hook(..., with_kwargs=True). None: the inputs are right as they are.
  pybind11::object pre_forward(const pybind11::object& module, const pybind11::tuple& args,
                               const pybind11::dict& kwargs);
  // For register_forward_hook(..., always_call=True). None: the output is right as it is.
  pybind11::object post_forward(const pybind11::object& module, const pybind11::object& args,
                                const pybind11::object& output);

 private:
  [[nodiscard]] static bool append_tensors(pybind11::handle value,
                                           std::vector<at::Tensor>& tensors);

  const pybind11::function long_pre_forward_;
  const pybind11::function long_post_forward_;
  const pybind11::function find_tensors_;
  std::weak_ptr<Engine> engine_;  // empty: the long way
  std::vector<int> units_;
  std::optional<at::ScalarType> input_dtype_;
};

// Whether a forward hook with always_call=True runs because the forward threw: it gets None then,
// as after a forward that returns None.
[[nodiscard]] bool has_forward_failed(const pybind11::object& output);

void bind_unit_hooks(pybind11::module_& module);

}  // namespace mics
