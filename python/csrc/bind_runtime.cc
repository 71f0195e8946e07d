#include <pybind11/chrono.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings.h"
#include "end_without_gil.h"
#include "mics/engine.h"
#include "mics/runtime_streams.h"
#include "mics/storage_part.h"
#include "mics/unit.h"
#include "parameter_exchange.h"
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
                                int partition_size, bool is_outer, CommunicatorPtr gather_rail,
                                CommunicatorPtr gather_intra, CommunicatorPtr reduce_rail,
                                CommunicatorPtr reduce_intra, CommunicatorPtr replicate) {
  UnitOptions options;
  options.name = std::move(name);
  options.parameters = std::move(parameters);
  options.shard = std::move(shard);
  options.gradient = std::move(gradient);
  options.parameter_dtype = parameter_dtype;
  options.reduce_dtype = reduce_dtype;
  options.partition_size = partition_size;
  options.is_outer = is_outer;
  const UnitCommunicators communicators = {{gather_rail.get(), gather_intra.get()},
                                           {reduce_rail.get(), reduce_intra.get()},
                                           replicate.get()};
  auto owned = std::shared_ptr<OwnedUnit>(
      new OwnedUnit{{gather_rail, gather_intra, reduce_rail, reduce_intra, replicate},
                    Unit(std::move(options), communicators)});
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

  py::class_<ParameterExchange, std::shared_ptr<ParameterExchange>>(module, "ParameterExchange")
      .def(py::init<>())
      .def("add", &ParameterExchange::add, py::arg("parameters"), py::arg("key"), py::kw_only(),
           py::arg("sharded"), py::arg("full"), py::arg("name"))
      .def("apply", &ParameterExchange::apply, py::arg("full"));

  py::class_<UnitParameter>(module, "UnitParameter")
      .def(py::init([](std::string name, std::vector<int64_t> sizes, at::Tensor sharded,
                       at::Tensor local, const std::optional<at::Tensor>& gradient) {
             return UnitParameter{std::move(name),      std::move(sizes),
                                  std::move(sharded),   gradient.value_or(at::Tensor()),
                                  gradient.has_value(), std::move(local)};
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
           py::arg("reduce_dtype"), py::arg("partition_size"), py::arg("is_outer"),
           py::arg("gather_rail"), py::arg("gather_intra"), py::arg("reduce_rail"),
           py::arg("reduce_intra"), py::arg("replicate"))
      .def_property("name", &Unit::name, &Unit::rename)
      .def_property_readonly("layout", &Unit::layout, py::return_value_policy::reference_internal)
      .def_property_readonly("gradient_layout", &Unit::gradient_layout,
                             py::return_value_policy::reference_internal)
      .def_property_readonly(
          "settings", [](Unit& self) -> UnitSettings& { return self.settings(); },
          py::return_value_policy::reference_internal)
      .def_property_readonly("is_unsharded", &Unit::is_unsharded)
      .def_property_readonly("has_pending", &Unit::has_pending)
      .def_property_readonly("has_full_gradient", &Unit::has_full_gradient)
      .def_property_readonly("is_accumulating", &Unit::is_accumulating)
      .def_property_readonly("is_lent", &Unit::is_lent)
      .def("matches_requires_grad", &Unit::matches_requires_grad)
      .def("full_views", &Unit::full_views)
      .def("set_full_parameters", &Unit::set_full_parameters)
      .def("set_exchange",
           [](Unit& self, std::shared_ptr<ParameterExchange> exchange) {
             self.set_exchange([exchange](bool full) { exchange->apply(full); });
           })
      .def("set_gradient_hook", &Unit::set_gradient_hook);

  py::class_<RuntimeStreams, std::shared_ptr<RuntimeStreams>>(module, "RuntimeStreams")
      .def(py::init([](bool on_threads) {
             return end_without_gil(on_threads ? make_worker_streams() : make_inline_streams());
           }),
           py::kw_only(), py::arg("on_threads"));

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
      .def("set_forward_prefetch", &Engine::set_forward_prefetch, py::arg("unit"), py::arg("ahead"))
      .def("set_backward_prefetch", &Engine::set_backward_prefetch, py::arg("unit"),
           py::arg("ahead"))
      .def("finish_backward", &Engine::finish_backward, Release())
      .def("set_manual_finalization", &Engine::set_manual_finalization)
      .def("unfinished_units", &Engine::unfinished_units)
      .def("matches_requires_grad", &Engine::matches_requires_grad)
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
      .def("set_refresh", &Engine::set_refresh, py::arg("refresh"))
      .def("set_hook_check", &Engine::set_hook_check, py::arg("check"))
      .def("adopt", &Engine::adopt, py::arg("older"), py::arg("units"), Release())
      .def("drop_gradients", &Engine::drop_gradients, py::arg("unit"), Release())
      .def("release_memory", &Engine::release_memory, Release())
      .def("memory", &Engine::memory, py::return_value_policy::reference_internal, Release())
      .def_property_readonly("num_order_changes", &Engine::num_order_changes)
      .def("exposed_gather", &Engine::exposed_gather, py::arg("unit"))
      .def("exposed_reduce", &Engine::exposed_reduce, py::arg("unit"))
      .def("reset", &Engine::reset, Release());

  bind_unit_hooks(module);
}

}  // namespace mics
