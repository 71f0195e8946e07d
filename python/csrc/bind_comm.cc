#include <pybind11/chrono.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include "bindings.h"
#include "comm/c10d/store_reports.h"
#include "mics/c10d_communicator.h"
#include "mics/communicator.h"
#include "mics/local_world.h"
#include "mics/shm_communicator.h"

namespace py = pybind11;

namespace mics {

namespace {

using Tensors = std::vector<at::Tensor>;

std::vector<TensorPair> to_pairs(const Tensors& outputs, const Tensors& inputs) {
  if (outputs.size() != inputs.size()) {
    throw py::value_error("a grouped collective needs as many outputs as inputs: got " +
                          std::to_string(outputs.size()) + " and " + std::to_string(inputs.size()) +
                          ".");
  }
  std::vector<TensorPair> pairs;
  for (size_t i = 0; i < outputs.size(); ++i) pairs.push_back({outputs[i], inputs[i]});
  return pairs;
}

GroupInfo to_group(std::string name, std::vector<int> world_ranks, std::vector<int> nodes,
                   int rank) {
  return {std::move(name), std::move(world_ranks), std::move(nodes), rank};
}

}  // namespace

void bind_comm(py::module_& module) {
  py::class_<Traffic>(module, "Traffic", "Calls and bytes of one communicator since it was made.")
      .def_readonly("calls", &Traffic::calls)
      .def_readonly("sent_intra_nbytes", &Traffic::sent_intra_nbytes)
      .def_readonly("sent_inter_nbytes", &Traffic::sent_inter_nbytes)
      .def_readonly("received_intra_nbytes", &Traffic::received_intra_nbytes)
      .def_readonly("received_inter_nbytes", &Traffic::received_inter_nbytes);

  using Release = py::call_guard<py::gil_scoped_release>;
  using Seconds = std::chrono::duration<double>;
  py::class_<LoggedOperation>(module, "LoggedOperation",
                              "One collective in a FlightLog. Times are those of time.monotonic().")
      .def_readonly("number", &LoggedOperation::number)
      .def_readonly("group", &LoggedOperation::group)
      .def_readonly("op", &LoggedOperation::op)
      .def_readonly("unit", &LoggedOperation::unit)
      .def_readonly("nbytes", &LoggedOperation::nbytes)
      .def_property_readonly("state",
                             [](const LoggedOperation& self) {
                               constexpr const char* kNames[] = {"issued", "started", "finished",
                                                                 "failed"};
                               return kNames[static_cast<size_t>(self.state)];
                             })
      // Of the monotonic clock, in seconds: as time.monotonic().
      .def_property_readonly("issued_at",
                             [](const LoggedOperation& self) {
                               return Seconds(self.issued_at.time_since_epoch()).count();
                             })
      .def_property_readonly("started_at",
                             [](const LoggedOperation& self) -> std::optional<double> {
                               if (self.state < LoggedOperation::State::kStarted) return {};
                               return Seconds(self.started_at.time_since_epoch()).count();
                             })
      .def_property_readonly("ended_at", [](const LoggedOperation& self) -> std::optional<double> {
        if (self.state < LoggedOperation::State::kFinished) return {};
        return Seconds(self.ended_at.time_since_epoch()).count();
      });
  py::class_<FlightLog, std::shared_ptr<FlightLog>>(
      module, "FlightLog", "The last collectives of this rank, and the progress of each group.")
      .def("operations", &FlightLog::operations, "The last operations, oldest first.")
      .def("begin_incident", &FlightLog::begin_incident,
           "Lets the next failure be reported; on all ranks equally often.", Release());
  module.def(
      "make_reporting_log",
      [](const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
         std::chrono::milliseconds interval, std::chrono::milliseconds patience) {
        return make_reporting_log(store, rank, world_size, interval, patience);
      },
      "A flight log whose report is a table of all ranks, through the Store.", py::arg("store"),
      py::kw_only(), py::arg("rank"), py::arg("world_size"), py::arg("interval"),
      py::arg("patience"), Release());
  py::class_<Communicator, std::shared_ptr<Communicator>>(
      module, "Communicator", "Collectives among the ranks of one group, in one total order.")
      .def_property_readonly("name", [](const Communicator& self) { return self.group().name; })
      .def_property_readonly("world_ranks",
                             [](const Communicator& self) { return self.group().world_ranks; })
      .def_property_readonly("rank", [](const Communicator& self) { return self.group().rank; })
      .def_property_readonly("size", [](const Communicator& self) { return self.group().size(); })
      .def_property_readonly("gathers_in_ring", &Communicator::gathers_in_ring)
      .def_property_readonly("reduces_in_ring", &Communicator::reduces_in_ring)
      .def_property_readonly("sums_in_wire_dtype", &Communicator::sums_in_wire_dtype)
      .def_property_readonly("traffic", [](const Communicator& self) { return self.traffic(); })
      .def(
          "all_gather",
          [](Communicator& self, const Tensors& outputs, const Tensors& inputs) {
            self.all_gather(to_pairs(outputs, inputs), *self.make_caller_stream());
          },
          "Gathers every member's inputs into the outputs, in rank order, as one launch.",
          py::arg("outputs"), py::arg("inputs"), Release())
      .def(
          "reduce_scatter",
          [](Communicator& self, const Tensors& outputs, const Tensors& inputs) {
            self.reduce_scatter(to_pairs(outputs, inputs), *self.make_caller_stream());
          },
          "Sums every member's inputs; piece r of the sum is left at rank r. One launch.",
          py::arg("outputs"), py::arg("inputs"), Release())
      .def(
          "all_reduce",
          [](Communicator& self, const at::Tensor& tensor) {
            self.all_reduce(tensor, *self.make_caller_stream());
          },
          "Replaces `tensor` by the sum over all members.", py::arg("tensor"), Release())
      .def("set_flight_log", &Communicator::set_flight_log,
           "Logs operations from here on; to be called before the first.", py::arg("log"))
      .def_property_readonly("staging_nbytes", &Communicator::staging_nbytes)
      .def("barrier", &Communicator::barrier, "Returns when every member has called it.",
           Release());

  py::class_<LocalWorld>(module, "LocalWorld", "Ranks that are threads of this process.")
      .def(py::init<int, std::chrono::milliseconds>(), py::arg("world_size"), py::kw_only(),
           py::arg("timeout"))
      .def(
          "make_communicator",
          [](LocalWorld& self, std::string name, std::vector<int> world_ranks,
             std::vector<int> nodes, int rank) {
            return std::shared_ptr<Communicator>(self.make_communicator(
                to_group(std::move(name), std::move(world_ranks), std::move(nodes), rank)));
          },
          "Called by each member on its own thread.", py::kw_only(), py::arg("name"),
          py::arg("world_ranks"), py::arg("nodes"), py::arg("rank"), py::keep_alive<0, 1>());

  module.def(
      "make_c10d_communicator",
      [](const c10::intrusive_ptr<c10d::ProcessGroup>& process_group, std::string name,
         std::vector<int> world_ranks, std::vector<int> nodes, int rank,
         std::chrono::milliseconds timeout) {
        return std::shared_ptr<Communicator>(make_c10d_communicator(
            to_group(std::move(name), std::move(world_ranks), std::move(nodes), rank),
            process_group, timeout));
      },
      "A communicator over a ProcessGroup with the members of the group.", py::arg("process_group"),
      py::kw_only(), py::arg("name"), py::arg("world_ranks"), py::arg("nodes"), py::arg("rank"),
      py::arg("timeout"), Release());

  py::class_<ShmGroup, std::shared_ptr<ShmGroup>>(
      module, "ShmGroup", "This rank's place in the shared memory segment of a group on one host.")
      .def(py::init([](std::string segment, bool creates, std::string name,
                       std::vector<int> world_ranks, std::vector<int> nodes, int rank,
                       std::chrono::milliseconds timeout) {
             const int64_t unit =
                 128 * static_cast<int64_t>(std::max<size_t>(world_ranks.size(), 1));
             return std::make_shared<ShmGroup>(
                 to_group(std::move(name), std::move(world_ranks), std::move(nodes), rank),
                 ShmOptions{std::move(segment), creates, kDefaultShmSlotNbytes / unit * unit,
                            timeout});
           }),
           py::arg("segment"), py::kw_only(), py::arg("creates"), py::arg("name"),
           py::arg("world_ranks"), py::arg("nodes"), py::arg("rank"), py::arg("timeout"), Release())
      .def(
          "make_communicator",
          [](const ShmGroup& self) {
            return std::shared_ptr<Communicator>(self.make_communicator());
          },
          "A communicator of the group; all of one group share one order.", py::keep_alive<0, 1>())
      .def_property_readonly("has_failed", &ShmGroup::has_failed);
  module.def("make_shm_segment_name", &make_shm_segment_name,
             "A name that is new on this host and tells which process made it.");
  module.def("remove_stale_shm_segments", &remove_stale_shm_segments,
             "Removes segments of processes that have ended; returns how many.", Release());
  module.def("shm_host_identity", &shm_host_identity,
             "Names the host as shared memory and process ids see it.");
}

}  // namespace mics
