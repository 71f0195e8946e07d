#include "unit_hooks.h"

#include <c10/core/GradMode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

namespace py = pybind11;

namespace mics {

namespace {

bool is_plain_value(py::handle value) {
  return value.is_none() || PyBool_Check(value.ptr()) || PyLong_Check(value.ptr()) ||
         PyFloat_Check(value.ptr()) || PyUnicode_Check(value.ptr());
}

// False when in doubt.
bool has_only(py::handle value, at::ScalarType dtype) {
  if (THPVariable_Check(value.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(value.ptr());
    return !tensor.is_floating_point() || tensor.scalar_type() == dtype;
  }
  if (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) {
    for (const py::handle item : py::reinterpret_borrow<py::sequence>(value)) {
      if (!has_only(item, dtype)) return false;
    }
    return true;
  }
  if (PyDict_Check(value.ptr())) {
    for (const auto& item : py::reinterpret_borrow<py::dict>(value)) {
      if (!has_only(item.second, dtype)) return false;
    }
    return true;
  }
  return is_plain_value(value);
}

}  // namespace

UnitHooks::UnitHooks(py::function long_pre_forward, py::function long_post_forward,
                     py::function find_tensors)
    : long_pre_forward_(std::move(long_pre_forward)),
      long_post_forward_(std::move(long_post_forward)),
      find_tensors_(std::move(find_tensors)) {}

bool has_forward_failed(const py::object& output) {
  if (!output.is_none()) return false;
  PyObject* type = nullptr;
  PyObject* value = nullptr;
  PyObject* trace = nullptr;
  PyErr_GetExcInfo(&type, &value, &trace);
  const bool is_handled = value != nullptr && value != Py_None;
  Py_XDECREF(type);
  Py_XDECREF(value);
  Py_XDECREF(trace);
  return is_handled;
}

void UnitHooks::connect(const std::shared_ptr<Engine>& engine, std::vector<int> units,
                        std::optional<at::ScalarType> input_dtype) {
  engine_ = engine;
  units_ = std::move(units);
  input_dtype_ = input_dtype;
}

py::object UnitHooks::pre_forward(const py::object& module, const py::tuple& args,
                                  const py::dict& kwargs) {
  const std::shared_ptr<Engine> engine = engine_.lock();
  const auto is_outermost = [&] {
    return !engine->is_in_forward() && torch::autograd::get_current_graph_task_id() == -1;
  };
  if (!engine || is_outermost() ||
      (input_dtype_ && !(has_only(args, *input_dtype_) && has_only(kwargs, *input_dtype_)))) {
    return long_pre_forward_(module, args, kwargs);
  }
  {
    const py::gil_scoped_release no_gil;
    for (const int unit : units_) engine->pre_forward(unit);
  }
  return py::none();
}

// False: something else than tensors, plain values and Python's own containers is in it.
bool UnitHooks::append_tensors(py::handle value, std::vector<at::Tensor>& tensors) {
  if (THPVariable_Check(value.ptr())) {
    tensors.push_back(THPVariable_Unpack(value.ptr()));
    return true;
  }
  if (PyTuple_Check(value.ptr()) || PyList_Check(value.ptr())) {
    for (const py::handle item : py::reinterpret_borrow<py::sequence>(value)) {
      if (!append_tensors(item, tensors)) return false;
    }
    return true;
  }
  if (PyDict_CheckExact(value.ptr())) {
    for (const auto& item : py::reinterpret_borrow<py::dict>(value)) {
      if (!append_tensors(item.second, tensors)) return false;
    }
    return true;
  }
  return is_plain_value(value);
}

py::object UnitHooks::post_forward(const py::object& module, const py::object& args,
                                   const py::object& output) {
  const std::shared_ptr<Engine> engine = engine_.lock();
  if (!engine) return long_post_forward_(module, args, output);
  const bool failed = has_forward_failed(output);
  const bool records = !failed && c10::GradMode::is_enabled();
  std::vector<at::Tensor> outputs;
  if (records && !append_tensors(output, outputs)) {
    outputs = find_tensors_(output).cast<std::vector<at::Tensor>>();
  }
  {
    const py::gil_scoped_release no_gil;
    for (auto unit = units_.rbegin(); unit != units_.rend(); ++unit) {
      if (records) engine->watch_outputs(*unit, outputs);
      engine->post_forward(*unit, failed);
    }
  }
  return py::none();
}

void bind_unit_hooks(py::module_& module) {
  module.def("has_forward_failed", &has_forward_failed,
             "Whether an always_call hook runs because the forward threw.", py::arg("output"));
  py::class_<UnitHooks, std::shared_ptr<UnitHooks>>(
      module, "UnitHooks",
      "Forward hooks of a unit's modules: a fast path in C++, else the given Python functions.")
      .def(py::init<py::function, py::function, py::function>(), py::kw_only(),
           py::arg("long_pre_forward"), py::arg("long_post_forward"), py::arg("find_tensors"))
      .def("connect", &UnitHooks::connect, "Takes the fast path for these units of the engine.",
           py::arg("engine"), py::arg("units"), py::kw_only(), py::arg("input_dtype"))
      .def("disconnect", &UnitHooks::disconnect, "Takes the Python functions from here on.")
      .def("pre_forward", &UnitHooks::pre_forward,
           "For register_forward_pre_hook(..., with_kwargs=True).")
      .def("post_forward", &UnitHooks::post_forward,
           "For register_forward_hook(..., always_call=True).");
}

}  // namespace mics
