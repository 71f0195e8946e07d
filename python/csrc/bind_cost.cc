#include <pybind11/stl.h>

#include "bindings.h"
#include "mics/model/cost_model.h"
#include "mics/model/measured_table.h"
#include "mics/model/memory_model.h"
#include "mics/model/planner.h"
#include "mics/model/step_model.h"
#include "mics/model/workload.h"

namespace py = pybind11;

namespace mics {
namespace {

// A struct as a Python class: made from keywords, each a field, with the defaults of C++.
template <typename Struct>
class Fields {
 public:
  Fields(py::module_& module, const char* name, const char* doc) : type_(module, name, doc) {
    type_.def(py::init([type = py::handle(type_)](const py::kwargs& fields) {
      py::object made = py::cast(Struct{});
      for (const auto& [key, value] : fields) {
        if (!py::hasattr(type, key)) {
          throw py::type_error(std::string(py::str(type.attr("__name__"))) + " has no field " +
                               std::string(py::str(key)));
        }
        py::setattr(made, key, value);
      }
      return made.cast<Struct>();
    }));
  }

  template <typename Value>
  Fields& field(const char* name, Value Struct::* member) {
    type_.def_readwrite(name, member);
    return *this;
  }

  py::class_<Struct>& type() { return type_; }

 private:
  py::class_<Struct> type_;
};

void bind_costs(py::module_& module) {
  py::enum_<Residency>(module, "Residency", "What of a unit stays in memory between two uses.")
      .value("SHARD", Residency::kShard)
      .value("BLOCK", Residency::kBlock)
      .value("FULL", Residency::kFull);
  Fields<ResidencySettings>(
      module, "ResidencySettings",
      "What of a unit stays after forward, between micro-steps, and of its gradients.")
      .field("after_forward", &ResidencySettings::after_forward)
      .field("between_microsteps", &ResidencySettings::between_microsteps)
      .field("gradient_accumulation", &ResidencySettings::gradient_accumulation);
  Fields<Link>(
      module, "Link",
      "One tier of the network: latency in seconds per step, bandwidth in bytes per second.")
      .field("latency", &Link::latency)
      .field("bandwidth", &Link::bandwidth);
  Fields<Machine>(module, "Machine", "The two tiers of a cluster's network and its ranks per node.")
      .field("ranks_per_node", &Machine::ranks_per_node)
      .field("launch", &Machine::launch)
      .field("rail_launch", &Machine::rail_launch)
      .field("intra", &Machine::intra)
      .field("inter", &Machine::inter);
  module.def("flat_seconds", py::overload_cast<const Machine&, int, double>(&flat_seconds),
             "Seconds of one all-gather or reduce-scatter of `nbytes` over all ranks at once.",
             py::arg("machine"), py::arg("num_ranks"), py::arg("nbytes"));
  module.def("rail_hop_seconds", &rail_hop_seconds,
             "Seconds of the hop over nodes of a collective of `nbytes`.", py::arg("machine"),
             py::arg("num_ranks"), py::arg("nbytes"));
  module.def("intra_hop_seconds", &intra_hop_seconds,
             "Seconds of the hop inside nodes of a collective of `nbytes`.", py::arg("machine"),
             py::arg("num_ranks"), py::arg("nbytes"));
  Fields<MeasuredPoint>(module, "MeasuredPoint", "Seconds of one collective, measured.")
      .field("num_ranks", &MeasuredPoint::num_ranks)
      .field("nbytes", &MeasuredPoint::nbytes)
      .field("seconds", &MeasuredPoint::seconds);
  py::class_<MeasuredTable>(module, "MeasuredTable",
                            "Measured seconds by number of ranks and bytes, interpolated.")
      .def(py::init<>())
      .def(py::init<std::vector<MeasuredPoint>>(), py::arg("points"))
      .def_property_readonly("points", &MeasuredTable::points);
}

void bind_workload(py::module_& module) {
  Fields<UnitWork>(module, "UnitWork", "Compute and memory of equal units, per unit and sample.")
      .field("name", &UnitWork::name)
      .field("num_units", &UnitWork::num_units)
      .field("numel", &UnitWork::numel)
      .field("forward_flops", &UnitWork::forward_flops)
      .field("saved_nbytes", &UnitWork::saved_nbytes)
      .field("input_nbytes", &UnitWork::input_nbytes)
      .field("can_recompute", &UnitWork::can_recompute)
      .field("transient_nbytes", &UnitWork::transient_nbytes);
  Fields<Workload> workload(module, "Workload",
                            "A model as the time model and the memory model see it.");
  workload.field("units", &Workload::units)
      .field("tokens_per_sample", &Workload::tokens_per_sample)
      .field("width", &Workload::width);
  workload.type()
      .def_property_readonly("numel", &Workload::numel)
      .def_property_readonly("num_units", &Workload::num_units)
      .def("flops", &Workload::flops,
           "FLOP of one sample, forward and backward; recomputed units count forward twice.",
           py::kw_only(), py::arg("recompute"));
  Fields<TransformerShape>(module, "TransformerShape",
                           "Sizes of a transformer, for transformer_workload().")
      .field("hidden", &TransformerShape::hidden)
      .field("mlp", &TransformerShape::mlp)
      .field("layers", &TransformerShape::layers)
      .field("heads", &TransformerShape::heads)
      .field("vocabulary", &TransformerShape::vocabulary)
      .field("sequence", &TransformerShape::sequence)
      .field("mlp_matrices", &TransformerShape::mlp_matrices)
      .field("is_tied", &TransformerShape::is_tied)
      .field("has_fused_attention", &TransformerShape::has_fused_attention);
  module.def("transformer_workload", &transformer_workload,
             "Embedding, layers and head of a transformer as a workload.", py::arg("shape"));
}

void bind_step(py::module_& module) {
  Fields<Contention>(module, "Contention",
                     "How much longer an operation takes while another queue is busy.")
      .field("compute_by_network", &Contention::compute_by_network)
      .field("compute_by_intra", &Contention::compute_by_intra)
      .field("network_by_compute", &Contention::network_by_compute);
  Fields<Cluster>(module, "Cluster", "One instance type, calibrated.")
      .field("machine", &Cluster::machine)
      .field("flat", &Cluster::flat)
      .field("rail_hop", &Cluster::rail_hop)
      .field("intra_hop", &Cluster::intra_hop)
      .field("contention", &Cluster::contention)
      .field("peak_flops", &Cluster::peak_flops)
      .field("efficiency", &Cluster::efficiency)
      .field("memory_bandwidth", &Cluster::memory_bandwidth);
  py::enum_<GradientSync>(module, "GradientSync", "When gradients are summed over which ranks.")
      .value("TWO_HOP", GradientSync::kTwoHop)
      .value("REPLICATE_EACH", GradientSync::kReplicateEach)
      .value("ALL_REDUCE_EACH", GradientSync::kAllReduceEach);
  Fields<StepSettings>(module, "StepSettings", "What a step is predicted for.")
      .field("world_size", &StepSettings::world_size)
      .field("partition_size", &StepSettings::partition_size)
      .field("gather", &StepSettings::gather)
      .field("reduce", &StepSettings::reduce)
      .field("residency", &StepSettings::residency)
      .field("prefetch_rail", &StepSettings::prefetch_rail)
      .field("prefetch_intra", &StepSettings::prefetch_intra)
      .field("num_microsteps", &StepSettings::num_microsteps)
      .field("micro_batch", &StepSettings::micro_batch)
      .field("recompute", &StepSettings::recompute)
      .field("overlap", &StepSettings::overlap)
      .field("overlap_replicate", &StepSettings::overlap_replicate)
      .field("sync", &StepSettings::sync)
      .field("parameter_nbytes", &StepSettings::parameter_nbytes)
      .field("gradient_nbytes", &StepSettings::gradient_nbytes)
      .field("replicate_nbytes", &StepSettings::replicate_nbytes);
  Fields<StepTime>(module, "StepTime", "Seconds of one step, and of its parts.")
      .field("total", &StepTime::total)
      .field("compute", &StepTime::compute)
      .field("contention", &StepTime::contention)
      .field("exposed", &StepTime::exposed)
      .field("optimizer", &StepTime::optimizer)
      .field("gather_rail", &StepTime::gather_rail)
      .field("gather_intra", &StepTime::gather_intra)
      .field("reduce_intra", &StepTime::reduce_intra)
      .field("reduce_rail", &StepTime::reduce_rail)
      .field("replicate", &StepTime::replicate)
      .field("is_extrapolated", &StepTime::is_extrapolated);
  module.def("step_time", &step_time, "Predicts the seconds of one optimizer step.",
             py::arg("workload"), py::arg("cluster"), py::arg("settings"));
  module.def("step_time_bound", &step_time_bound,
             "A lower bound of step_time(): the busiest queue, without any waiting.",
             py::arg("workload"), py::arg("cluster"), py::arg("settings"));
}

void bind_memory(py::module_& module) {
  Fields<MemoryLimits>(module, "MemoryLimits",
                       "Memory of one rank's device, and what is taken of it in any case.")
      .field("capacity_nbytes", &MemoryLimits::capacity_nbytes)
      .field("usable", &MemoryLimits::usable)
      .field("context_nbytes", &MemoryLimits::context_nbytes)
      .field("communicator_nbytes", &MemoryLimits::communicator_nbytes)
      .field("state_nbytes", &MemoryLimits::state_nbytes)
      .field("bucket_nbytes", &MemoryLimits::bucket_nbytes);
  Fields<MemoryTerms>(module, "MemoryTerms",
                      "Bytes that one rank holds, term by term, and the peak.")
      .field("states", &MemoryTerms::states)
      .field("parameters_kept", &MemoryTerms::parameters_kept)
      .field("gradients_kept", &MemoryTerms::gradients_kept)
      .field("gathered", &MemoryTerms::gathered)
      .field("staging", &MemoryTerms::staging)
      .field("unit_gradients", &MemoryTerms::unit_gradients)
      .field("activations", &MemoryTerms::activations)
      .field("recomputation", &MemoryTerms::recomputation)
      .field("head", &MemoryTerms::head)
      .field("communicators", &MemoryTerms::communicators)
      .field("forward_end", &MemoryTerms::forward_end)
      .field("backward", &MemoryTerms::backward)
      .field("peak", &MemoryTerms::peak);
  module.def("step_memory", &step_memory,
             "Predicts the bytes that one rank holds at its fullest moment.", py::arg("workload"),
             py::arg("cluster"), py::arg("settings"), py::arg("limits"));
  module.def("fits", &fits, "Whether a peak is within the usable memory.", py::arg("memory"),
             py::arg("limits"));
}

void bind_planner(py::module_& module) {
  Fields<PlanRequest>(module, "PlanRequest", "What plan_step() searches.")
      .field("workload", &PlanRequest::workload)
      .field("cluster", &PlanRequest::cluster)
      .field("limits", &PlanRequest::limits)
      .field("world_size", &PlanRequest::world_size)
      .field("global_batch", &PlanRequest::global_batch)
      .field("partition_sizes", &PlanRequest::partition_sizes)
      .field("micro_batches", &PlanRequest::micro_batches)
      .field("variants", &PlanRequest::variants)
      .field("recompute", &PlanRequest::recompute)
      .field("vary_residency", &PlanRequest::vary_residency)
      .field("vary_prefetch", &PlanRequest::vary_prefetch)
      .field("base", &PlanRequest::base)
      .field("num_ranked", &PlanRequest::num_ranked);
  Fields<Candidate>(module, "Candidate", "One way to run a workload, with its time and memory.")
      .field("settings", &Candidate::settings)
      .field("time", &Candidate::time)
      .field("memory", &Candidate::memory);
  Fields<PlanResult>(module, "PlanResult", "What plan_step() found, fastest first.")
      .field("ranked", &PlanResult::ranked)
      .field("leaders", &PlanResult::leaders)
      .field("misses", &PlanResult::misses)
      .field("num_considered", &PlanResult::num_considered)
      .field("num_fitting", &PlanResult::num_fitting)
      .field("num_simulated", &PlanResult::num_simulated);
  module.def("plan_step", &plan_step,
             "Every legal way to run a workload on a cluster, within memory, fastest first.",
             py::arg("request"), py::call_guard<py::gil_scoped_release>());
}

// What a run should count, from the lengths of a unit's layout: bytes that one rank receives.
void bind_bytes(py::module_& module) {
  Fields<HopCounts>(module, "HopCounts", "How often each hop of a unit runs in one step.")
      .field("gather_rail", &HopCounts::gather_rail)
      .field("gather_intra", &HopCounts::gather_intra)
      .field("reduce_intra", &HopCounts::reduce_intra)
      .field("reduce_rail", &HopCounts::reduce_rail)
      .field("replicate", &HopCounts::replicate);
  Fields<UnitSize>(module, "UnitSize", "A unit as step_bytes() sees it.")
      .field("shard_numel", &UnitSize::shard_numel)
      .field("payload_numel", &UnitSize::payload_numel)
      .field("gradient_shard_numel", &UnitSize::gradient_shard_numel)
      .field("gradient_payload_numel", &UnitSize::gradient_payload_numel)
      .field("parameter_nbytes", &UnitSize::parameter_nbytes)
      .field("gradient_nbytes", &UnitSize::gradient_nbytes)
      .field("replicate_nbytes", &UnitSize::replicate_nbytes);
  Fields<StepBytes>(module, "StepBytes",
                    "Bytes that one rank receives in one step, by communicator.")
      .field("gather_rail", &StepBytes::gather_rail)
      .field("gather_intra", &StepBytes::gather_intra)
      .field("reduce_rail", &StepBytes::reduce_rail)
      .field("reduce_intra", &StepBytes::reduce_intra)
      .field("replicate", &StepBytes::replicate);
  module.def("count_hops", &count_hops, "Counts the hops of a unit in one step.",
             py::arg("residency"), py::arg("num_microsteps"), py::arg("replication_size"));
  module.def(
      "step_bytes",
      [](const UnitSize& unit, std::pair<int, int> shape, int replication_size,
         const HopCounts& hops) {
        return step_bytes(unit, {shape.first, shape.second}, replication_size, hops);
      },
      "Bytes of one unit in one step.", py::arg("unit"), py::arg("shape"),
      py::arg("replication_size"), py::arg("hops"));
}

}  // namespace

void bind_cost(py::module_& module) {
  bind_costs(module);
  bind_workload(module);
  bind_step(module);
  bind_memory(module);
  bind_planner(module);
  bind_bytes(module);
}

}  // namespace mics
