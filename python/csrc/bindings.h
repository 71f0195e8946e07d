// The parts of torch_mics._C, one per layer.
#pragma once

#include <pybind11/pybind11.h>

namespace mics {

void bind_plan(pybind11::module_& module);
void bind_cost(pybind11::module_& module);  // time and memory models
void bind_comm(pybind11::module_& module);
void bind_runtime(pybind11::module_& module);
void bind_nccl(pybind11::module_& module);   // after the runtime, whose streams it makes
void bind_races(pybind11::module_& module);  // after the runtime
void bind_optim(pybind11::module_& module);

}  // namespace mics
