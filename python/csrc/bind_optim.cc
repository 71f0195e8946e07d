#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>

#include "bindings.h"
#include "mics/flat_optimizer.h"
#include "optim/neighbours.h"

namespace py = pybind11;

namespace mics {

namespace {

using OptionalTensor = std::optional<at::Tensor>;

// Every parameters[i].grad is gradients[i], the same object or None. Checked before every step for
// every parameter, so without a Python object or a reference count in between.
bool gradients_are(const py::list& parameters, const py::list& gradients) {
  if (parameters.size() != gradients.size()) return false;
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& found = THPVariable_Unpack(py::handle(parameters[i]).ptr()).grad();
    const py::handle expected = gradients[i];
    const bool is_same =
        expected.is_none() ? !found.defined() : found.is_same(THPVariable_Unpack(expected.ptr()));
    if (!is_same) return false;
  }
  return true;
}

// Every dictionary of the (dictionary, key, value) triples holds the value itself under the key.
bool entries_are(const py::list& triples) {
  for (const py::handle each : triples) {
    PyObject* triple = each.ptr();
    PyObject* found =
        PyDict_GetItemWithError(PyTuple_GET_ITEM(triple, 0), PyTuple_GET_ITEM(triple, 1));
    if (found == nullptr && PyErr_Occurred() != nullptr) throw py::error_already_set();
    if (found != PyTuple_GET_ITEM(triple, 2)) return false;
  }
  return true;
}

}  // namespace

void bind_optim(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;

  py::class_<AdamWRun>(
      module, "AdamWRun",
      "Neighbouring parameters with one gradient and one state, flat; for adamw_step().")
      .def(py::init([](at::Tensor parameter, at::Tensor gradient, at::Tensor exp_avg,
                       at::Tensor exp_avg_sq, const OptionalTensor& max_exp_avg_sq) {
             return AdamWRun{std::move(parameter), std::move(gradient), std::move(exp_avg),
                             std::move(exp_avg_sq), max_exp_avg_sq.value_or(at::Tensor())};
           }),
           py::kw_only(), py::arg("parameter"), py::arg("gradient"), py::arg("exp_avg"),
           py::arg("exp_avg_sq"), py::arg("max_exp_avg_sq"));

  py::class_<SgdRun>(
      module, "SgdRun",
      "Neighbouring parameters with one gradient and one momentum buffer, flat; for sgd_step().")
      .def(py::init([](at::Tensor parameter, at::Tensor gradient,
                       const OptionalTensor& momentum_buffer) {
             return SgdRun{std::move(parameter), std::move(gradient),
                           momentum_buffer.value_or(at::Tensor())};
           }),
           py::kw_only(), py::arg("parameter"), py::arg("gradient"), py::arg("momentum_buffer"));

  module.def("join_neighbours", &join_neighbours,
             "Flat views that hold each element of `tensors` once and nothing else.",
             py::arg("tensors"), Release());
  module.def("gradients_are", &gradients_are,
             "Whether the `.grad` of each parameter is the tensor, or None, of `gradients`.",
             py::arg("parameters"), py::arg("gradients"));
  module.def("entries_are", &entries_are,
             "Whether each (dictionary, key, value) holds that very value.", py::arg("triples"));

  module.def(
      "adamw_step",
      [](const std::vector<AdamWRun>& runs, const std::vector<double>& steps, double lr,
         double beta1, double beta2, double eps, double weight_decay, bool maximize, bool fused) {
        adamw_step(runs, steps, {lr, beta1, beta2, eps, weight_decay, maximize, fused});
      },
      "One step of AdamW, bit for bit as torch's single-tensor form or its fused one.",
      py::arg("runs"), py::arg("steps"), py::kw_only(), py::arg("lr"), py::arg("beta1"),
      py::arg("beta2"), py::arg("eps"), py::arg("weight_decay"), py::arg("maximize"),
      py::arg("fused") = false, Release());

  module.def(
      "sgd_step",
      [](const std::vector<SgdRun>& runs, const std::vector<bool>& is_first, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
        sgd_step(runs, is_first, {lr, momentum, dampening, weight_decay, nesterov, maximize});
      },
      "One step of SGD, bit for bit as torch's single-tensor form.", py::arg("runs"),
      py::arg("is_first"), py::kw_only(), py::arg("lr"), py::arg("momentum"), py::arg("dampening"),
      py::arg("weight_decay"), py::arg("nesterov"), py::arg("maximize"), Release());
}

}  // namespace mics
