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

// What RuntimeMemory says of itself at one moment. It goes with release_memory(), this stays.
struct MemoryReport {
  std::vector<MemoryPart> parts;
  int64_t nbytes;
  int64_t num_grown;
  int64_t grown_nbytes;
};

MemoryReport report_memory(Engine& engine) {
  const py::gil_scoped_release no_gil;
  const RuntimeMemory& memory = engine.memory();
  return {memory.parts(), memory.nbytes(), memory.num_grown(), memory.grown_nbytes()};
}

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

  module.def("layout_alignment", &layout_alignment,
             "Elements to which chunks are aligned: 16 bytes of the narrower dtype.",
             py::arg("parameter_dtype"), py::arg("reduce_dtype"));

  module.def(
      "make_part",
      [](const at::Tensor& buffer, int64_t offset, const std::vector<int64_t>& sizes) {
        return make_part(buffer, offset, sizes);
      },
      "A tensor over a part of `buffer`, with a storage of its own.", py::arg("buffer"),
      py::arg("offset"), py::arg("sizes"));
  module.def("distance_between", &distance_between,
             "Elements from `first` to `second` in one buffer; None where they lie in two.",
             py::arg("first"), py::arg("second"));
  module.def("span_from", &span_from,
             "The next `numel` elements of the buffer in which `first` lies, as a tensor.",
             py::arg("first"), py::arg("numel"));

  py::class_<ParameterRegistration, std::shared_ptr<ParameterRegistration>>(
      module, "ParameterRegistration",
      "Puts the full or the sharded parameters of a unit into its modules.")
      .def(py::init<>())
      .def("add", &ParameterRegistration::add,
           "Adds one place of a parameter: a module's `_parameters` and the name there.",
           py::arg("parameters"), py::arg("key"), py::kw_only(), py::arg("sharded"),
           py::arg("full"), py::arg("name"));

  py::class_<UnitParameter>(
      module, "UnitParameter",
      "One parameter of a unit. `gradient` is what its `.grad` is set to; None when frozen.")
      .def(py::init([](std::string name, std::vector<int64_t> sizes, at::Tensor sharded,
                       at::Tensor local, const std::optional<at::Tensor>& gradient) {
             return UnitParameter{std::move(name), std::move(sizes), std::move(sharded),
                                  gradient.value_or(at::Tensor()), std::move(local)};
           }),
           py::kw_only(), py::arg("name"), py::arg("sizes"), py::arg("sharded"), py::arg("local"),
           py::arg("gradient"));

  py::class_<UnitSettings>(module, "UnitSettings", "How a unit behaves; may change between steps.")
      .def_readwrite("residency", &UnitSettings::residency)
      .def_readwrite("unshard_in_backward", &UnitSettings::unshard_in_backward)
      .def_readwrite("reduce_gradients", &UnitSettings::reduce_gradients)
      .def_readwrite("synchronize_gradients", &UnitSettings::synchronize_gradients)
      .def_readwrite("gradient_factor", &UnitSettings::gradient_factor);

  py::class_<Unit, std::shared_ptr<Unit>>(
      module, "Unit",
      "Parameters that are gathered, reduced and freed together, and the state of their gradients.")
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
      .def_property_readonly(
          "has_accumulated",
          [](const Unit& self) { return has_accumulated(self.gradients().state()); })
      .def_property_readonly("has_full_gradient",
                             [](const Unit& self) { return self.gradients().has_full(); })
      .def_property_readonly("is_accumulating",
                             [](const Unit& self) { return self.gradients().is_accumulating(); })
      .def_property_readonly("is_lent", &Unit::is_lent)
      .def(
          "matches_requires_grad",
          [](const Unit& self) { return self.parameters().matches_requires_grad(); },
          "False when a sharded parameter was frozen or unfrozen and its full one was not.")
      .def(
          "full_views", [](const Unit& self) { return self.parameters().full_views(); },
          "Views of the full buffer, one per parameter; readable while unsharded.")
      .def(
          "set_full_parameters",
          [](Unit& self, std::vector<at::Tensor> full) {
            self.parameters().set_full(std::move(full));
          },
          "The leaf tensors over full_views() that autograd sees.")
      .def(
          "set_registration",
          [](Unit& self, std::shared_ptr<ParameterRegistration> registration) {
            self.parameters().set_registration(
                [registration](ParameterKind kind) { registration->apply(kind); });
          },
          "How full and sharded parameters get into the modules.")
      .def(
          "set_gradient_hook",
          [](Unit& self, std::function<void(const at::Tensor&)> hook) {
            self.gradients().set_hook(std::move(hook));
          },
          "Called with the synchronized gradient before it becomes visible.");

  py::class_<RuntimeStreams, std::shared_ptr<RuntimeStreams>>(
      module, "RuntimeStreams",
      "The streams of one rank's runtime: threads of their own, or the caller's.")
      .def(py::init([](bool on_threads) {
             return end_without_gil(on_threads ? make_worker_streams() : make_inline_streams());
           }),
           py::kw_only(), py::arg("on_threads"));

  py::enum_<Phase>(module, "Phase", "When units are used.")
      .value("FORWARD", Phase::kForward)
      .value("BACKWARD", Phase::kBackward);

  py::class_<ExposedTime>(module, "ExposedTime",
                          "Time that the calling thread waited for communication of a unit.")
      .def_readonly("gather", &ExposedTime::gather)
      .def_readonly("reduce", &ExposedTime::reduce);

  py::class_<Depths>(module, "Depths",
                     "How far the runtime works ahead: prefetched units, and reductions in flight.")
      .def(py::init<>())
      .def_readwrite("intra", &Depths::intra)
      .def_readwrite("rail", &Depths::rail)
      .def_readwrite("reductions", &Depths::reductions);

  py::class_<MemoryPart>(module, "MemoryPart", "One part of the runtime's allocation.")
      .def_readonly("name", &MemoryPart::name)
      .def_readonly("count", &MemoryPart::count)
      .def_readonly("nbytes", &MemoryPart::nbytes);

  py::class_<MemoryReport>(
      module, "MemoryReport",
      "What the runtime works in, one allocation, as it was when the engine was asked.")
      .def_readonly("parts", &MemoryReport::parts)
      .def_readonly("nbytes", &MemoryReport::nbytes)
      .def_readonly("num_grown", &MemoryReport::num_grown)
      .def_readonly("grown_nbytes", &MemoryReport::grown_nbytes);

  py::class_<Engine, std::shared_ptr<Engine>>(
      module, "Engine", "Runs the units of one root module through forward and backward.")
      .def(py::init(&make_engine), py::arg("units"), py::kw_only(), py::arg("control"),
           py::arg("streams"), py::arg("depths"), py::keep_alive<1, 3>())
      .def("pre_forward", &Engine::pre_forward, "A forward of the unit begins: gathers it.",
           py::arg("unit"), Release())
      .def("watch_outputs", &Engine::watch_outputs,
           "Lets backward of the open forward start at these outputs.", py::arg("unit"),
           py::arg("outputs"), Release())
      .def("post_forward", &Engine::post_forward, "A forward of the unit ends.", py::arg("unit"),
           py::kw_only(), py::arg("failed"), Release())
      .def("unshard", &Engine::unshard, "Gathers the unit, until reshard().", py::arg("unit"),
           Release())
      .def("reshard", &Engine::reshard, "Ends unshard().", py::arg("unit"), Release())
      .def("prefetch", &Engine::prefetch, "Starts to gather the unit; kept until its next use.",
           py::arg("unit"), Release())
      .def("note_written", &Engine::note_written,
           "The shards of these units were written; on all ranks alike.", py::arg("units"))
      .def("set_prefetch", &Engine::set_prefetch,
           "Units to gather when a phase of the unit begins; empty: the recorded order.",
           py::arg("phase"), py::arg("unit"), py::arg("ahead"))
      .def("set_depths", &Engine::set_depths, "How far to work ahead; between steps.",
           py::arg("depths"), Release())
      .def("finish_backward", &Engine::finish_backward,
           "Ends a backward under manual finalization.", Release())
      .def("set_manual_finalization", &Engine::set_manual_finalization,
           "Whether finish_backward() is called by hand.")
      .def(
          "unplanned_sum_nbytes",
          [](const Engine& self) { return unplanned_sum_nbytes(self.units()); },
          "Bytes of memory for sums of gradients that was not planned.")
      .def(
          "unfinished_units", [](const Engine& self) { return unfinished_units(self.units()); },
          "Names of units with gradients that are not visible.")
      .def(
          "matches_requires_grad",
          [](const Engine& self) { return match_requires_grad(self.units()); },
          "False when a sharded parameter was frozen or unfrozen and its full one was not.")
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
          "Lets full parameters require gradients as the sharded ones do now.", py::arg("unit"),
          py::arg("gradients"), py::arg("gradient"))
      .def("lend", &Engine::lend, "Another module is about to use the unit's full parameters.",
           py::arg("unit"), py::kw_only(), py::arg("is_group"), Release())
      .def_property_readonly("is_in_forward", &Engine::is_in_forward)
      .def(
          "set_callbacks",
          [](Engine& self, std::function<void()> refresh, std::function<void()> check_hooks) {
            self.set_callbacks({std::move(refresh), std::move(check_hooks)});
          },
          "Called where requires_grad has changed, and where hooks may have been set.",
          py::kw_only(), py::arg("refresh"), py::arg("check_hooks"))
      .def("adopt", &Engine::adopt,
           "Takes over the units, graphs and gradients of an older engine.", py::arg("older"),
           py::arg("units"), Release())
      .def("drop_gradients", &Engine::drop_gradients,
           "Drops the unit's gradients that are not visible.", py::arg("unit"), Release())
      .def("release_memory", &Engine::release_memory,
           "Frees the runtime's memory until the next gather.", Release())
      .def("memory", &report_memory, "The runtime's memory now, planned if it is not there.")
      .def_property_readonly("num_order_changes", &Engine::num_order_changes)
      .def("exposed", &Engine::exposed, "Time that the calling thread has waited for the unit.",
           py::arg("unit"))
      .def("reset", &Engine::reset, "Drops what is in flight, on all ranks, after an exception.",
           Release());

  bind_unit_hooks(module);
}

}  // namespace mics
