#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"
#include "end_without_gil.h"
#include "mics/engine.h"
#include "mics/runtime_streams.h"
#include "mics/unit.h"
#include "optim/storage_part.h"
#include "parameter_registration.h"
#include "runtime/runtime_memory.h"
#include "unit_hooks.h"

namespace py = pybind11;

namespace mics {

namespace {

using CommunicatorPtr = std::shared_ptr<Communicator>;

// A unit and what must outlive it. The communicators are declared first, so they go last.
struct OwnedUnit {
  std::vector<CommunicatorPtr> communicators;
  Unit unit;
};

std::shared_ptr<Unit> make_unit(std::string name, std::vector<UnitParameter> parameters,
                                at::Tensor shard, at::Tensor gradient,
                                at::ScalarType parameter_dtype, at::ScalarType reduce_dtype,
                                int partition_size, bool has_nested_units,
                                CommunicatorPtr gather_rail, CommunicatorPtr gather_intra,
                                CommunicatorPtr reduce_rail, CommunicatorPtr reduce_intra,
                                CommunicatorPtr replicate) {
  UnitOptions options;
  options.name = std::move(name);
  options.parameters = std::move(parameters);
  options.shard = std::move(shard);
  options.gradient = std::move(gradient);
  options.parameter_dtype = parameter_dtype;
  options.reduce_dtype = reduce_dtype;
  options.partition_size = partition_size;
  options.has_nested_units = has_nested_units;
  const UnitCommunicators communicators = {{gather_rail.get(), gather_intra.get()},
                                           {reduce_rail.get(), reduce_intra.get()},
                                           replicate.get()};
  auto owned = std::shared_ptr<OwnedUnit>(
      new OwnedUnit{{gather_rail, gather_intra, reduce_rail, reduce_intra, replicate},
                    Unit(options, communicators)});
  return std::shared_ptr<Unit>(owned, &owned->unit);
}

std::shared_ptr<Engine> make_engine(std::vector<std::shared_ptr<Unit>> units,
                                    const CommunicatorPtr& control,
                                    std::shared_ptr<RuntimeStreams> streams, const Depths& depths) {
  return end_without_gil(
      Engine::create(std::move(units), control.get(), std::move(streams), depths));
}

}  // namespace

void bind_runtime(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;

  module.def("layout_alignment", &layout_alignment, py::arg("parameter_dtype"),
             py::arg("reduce_dtype"));

  module.def(
      "make_part",
      [](const at::Tensor& buffer, int64_t offset, const std::vector<int64_t>& sizes) {
        return make_part(buffer, offset, sizes);
      },
      py::arg("buffer"), py::arg("offset"), py::arg("sizes"));
  module.def("distance_between", &distance_between, py::arg("first"), py::arg("second"));
  module.def("span_from", &span_from, py::arg("first"), py::arg("numel"));

  py::class_<ParameterRegistration, std::shared_ptr<ParameterRegistration>>(module,
                                                                            "ParameterRegistration")
      .def(py::init<>())
      .def("add", &ParameterRegistration::add, py::arg("parameters"), py::arg("key"), py::kw_only(),
           py::arg("sharded"), py::arg("full"), py::arg("name"));

  py::class_<UnitParameter>(module, "UnitParameter")
      .def(py::init([](std::string name, std::vector<int64_t> sizes, at::Tensor sharded,
                       at::Tensor local, const std::optional<at::Tensor>& gradient) {
             return UnitParameter{std::move(name), std::move(sizes), std::move(sharded),
                                  gradient.value_or(at::Tensor()), std::move(local)};
           }),
           py::kw_only(), py::arg("name"), py::arg("sizes"), py::arg("sharded"), py::arg("local"),
           py::arg("gradient"));

  py::class_<UnitSettings>(module, "UnitSettings")
      .def_readwrite("residency", &UnitSettings::residency)
      .def_readwrite("unshard_in_backward", &UnitSettings::unshard_in_backward)
      .def_readwrite("reduce_gradients", &UnitSettings::reduce_gradients)
      .def_readwrite("synchronize_gradients", &UnitSettings::synchronize_gradients)
      .def_readwrite("gradient_factor", &UnitSettings::gradient_factor);

  py::class_<Unit, std::shared_ptr<Unit>>(module, "Unit")
      .def(py::init(&make_unit), py::kw_only(), py::arg("name"), py::arg("parameters"),
           py::arg("shard"), py::arg("gradient"), py::arg("parameter_dtype"),
           py::arg("reduce_dtype"), py::arg("partition_size"), py::arg("has_nested_units"),
           py::arg("gather_rail"), py::arg("gather_intra"), py::arg("reduce_rail"),
           py::arg("reduce_intra"), py::arg("replicate"))
      .def_property(
          "name", &Unit::name,
          [](Unit& self, std::string name) { self.parameters().rename_unit(std::move(name)); })
      .def_property_readonly(
          "layout", [](const Unit& self) { return &self.parameters().layout(); },
          py::return_value_policy::reference_internal)
      .def_property_readonly(
          "gradient_layout", [](const Unit& self) { return &self.gradients().layout(); },
          py::return_value_policy::reference_internal)
      .def_property_readonly(
          "settings", [](Unit& self) { return &self.settings(); },
          py::return_value_policy::reference_internal)
      .def_property_readonly("is_unsharded",
                             [](const Unit& self) { return self.parameters().is_unsharded(); })
      .def_property_readonly("has_accumulated",
                             [](const Unit& self) { return self.gradients().has_accumulated(); })
      .def_property_readonly("has_full_gradient",
                             [](const Unit& self) { return self.gradients().has_full(); })
      .def_property_readonly("is_accumulating",
                             [](const Unit& self) { return self.gradients().is_accumulating(); })
      .def_property_readonly("is_lent", &Unit::is_lent)
      .def("matches_requires_grad",
           [](const Unit& self) { return self.parameters().matches_requires_grad(); })
      .def("full_views", [](const Unit& self) { return self.parameters().full_views(); })
      .def("set_full_parameters",
           [](Unit& self, std::vector<at::Tensor> full) {
             self.parameters().set_full(std::move(full));
           })
      .def("set_registration",
           [](Unit& self, std::shared_ptr<ParameterRegistration> registration) {
             self.parameters().set_registration(
                 [registration](ParameterKind kind) { registration->apply(kind); });
           })
      .def("set_gradient_hook", [](Unit& self, std::function<void(const at::Tensor&)> hook) {
        self.gradients().set_hook(std::move(hook));
      });

  py::class_<RuntimeStreams, std::shared_ptr<RuntimeStreams>>(module, "RuntimeStreams")
      .def(py::init([](bool on_threads) {
             return end_without_gil(on_threads ? make_worker_streams() : make_inline_streams());
           }),
           py::kw_only(), py::arg("on_threads"));

  py::enum_<Phase>(module, "Phase")
      .value("FORWARD", Phase::kForward)
      .value("BACKWARD", Phase::kBackward);

  py::class_<ExposedTime>(module, "ExposedTime")
      .def_readonly("gather", &ExposedTime::gather)
      .def_readonly("reduce", &ExposedTime::reduce);

  py::class_<Depths>(module, "Depths")
      .def(py::init<>())
      .def_readwrite("intra", &Depths::intra)
      .def_readwrite("rail", &Depths::rail)
      .def_readwrite("reductions", &Depths::reductions);

  py::class_<MemoryPart>(module, "MemoryPart")
      .def_readonly("name", &MemoryPart::name)
      .def_readonly("count", &MemoryPart::count)
      .def_readonly("nbytes", &MemoryPart::nbytes);

  py::class_<RuntimeMemory>(module, "RuntimeMemory")
      .def_property_readonly("parts", &RuntimeMemory::parts)
      .def_property_readonly("nbytes", &RuntimeMemory::nbytes)
      .def_property_readonly("num_grown", &RuntimeMemory::num_grown)
      .def_property_readonly("grown_nbytes", &RuntimeMemory::grown_nbytes);

  py::class_<Engine, std::shared_ptr<Engine>>(module, "Engine")
      .def(py::init(&make_engine), py::arg("units"), py::kw_only(), py::arg("control"),
           py::arg("streams"), py::arg("depths"), py::keep_alive<1, 3>())
      .def("pre_forward", &Engine::pre_forward, py::arg("unit"), Release())
      .def("watch_outputs", &Engine::watch_outputs, py::arg("unit"), py::arg("outputs"), Release())
      .def("post_forward", &Engine::post_forward, py::arg("unit"), py::kw_only(), py::arg("failed"),
           Release())
      .def("unshard", &Engine::unshard, py::arg("unit"), Release())
      .def("reshard", &Engine::reshard, py::arg("unit"), Release())
      .def("prefetch", &Engine::prefetch, py::arg("unit"), Release())
      .def("note_written", &Engine::note_written, py::arg("units"))
      .def("set_prefetch", &Engine::set_prefetch, py::arg("phase"), py::arg("unit"),
           py::arg("ahead"))
      .def("set_depths", &Engine::set_depths, py::arg("depths"), Release())
      .def("finish_backward", &Engine::finish_backward, Release())
      .def("set_manual_finalization", &Engine::set_manual_finalization)
      .def("unfinished_units", [](const Engine& self) { return unfinished_units(self.units()); })
      .def("matches_requires_grad",
           [](const Engine& self) { return match_requires_grad(self.units()); })
      .def(
          "change_trainable",
          [](Engine& self, int unit, const std::vector<std::optional<at::Tensor>>& gradients,
             at::Tensor gradient) {
            std::vector<at::Tensor> defined;
            for (const std::optional<at::Tensor>& each : gradients) {
              defined.push_back(each.value_or(at::Tensor()));
            }
            const py::gil_scoped_release no_gil;
            self.change_trainable(unit, defined, std::move(gradient));
          },
          py::arg("unit"), py::arg("gradients"), py::arg("gradient"))
      .def("lend", &Engine::lend, py::arg("unit"), py::kw_only(), py::arg("is_group"), Release())
      .def_property_readonly("is_in_forward", &Engine::is_in_forward)
      .def(
          "set_callbacks",
          [](Engine& self, std::function<void()> refresh, std::function<void()> check_hooks) {
            self.set_callbacks({std::move(refresh), std::move(check_hooks)});
          },
          py::kw_only(), py::arg("refresh"), py::arg("check_hooks"))
      .def("adopt", &Engine::adopt, py::arg("older"), py::arg("units"), Release())
      .def("drop_gradients", &Engine::drop_gradients, py::arg("unit"), Release())
      .def("release_memory", &Engine::release_memory, Release())
      .def("memory", &Engine::memory, py::return_value_policy::reference_internal, Release())
      .def_property_readonly("num_order_changes", &Engine::num_order_changes)
      .def("exposed", &Engine::exposed, py::arg("unit"))
      .def("reset", &Engine::reset, Release());

  bind_unit_hooks(module);
}

}  // namespace mics
