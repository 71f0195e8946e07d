// The race detector.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

#include "bindings.h"
#include "mics/race_detector.h"
#include "mics/runtime_streams.h"

namespace py = pybind11;

namespace mics {

namespace {

void watch(const std::shared_ptr<RaceDetector>& detector, RuntimeStreams& streams) {
  const std::pair<Stream*, const char*> all[] = {
      {streams.compute.get(), "compute"},           {streams.gather_rail.get(), "gather_rail"},
      {streams.gather_intra.get(), "gather_intra"}, {streams.reduce_intra.get(), "reduce_intra"},
      {streams.reduce_rail.get(), "reduce_rail"},   {streams.replicate.get(), "replicate"}};
  for (const auto& [stream, name] : all) {
    detector->add_stream(*stream, name, /*is_callers=*/stream == streams.compute.get());
    stream->set_observer(detector);
  }
}

}  // namespace

void bind_races(py::module_& module) {
  using Release = py::call_guard<py::gil_scoped_release>;

  py::class_<RaceDetector::Noticed>(module, "NoticedDefects",
                                    "Defects of one kind that were put into a trace.")
      .def_readonly("noticed", &RaceDetector::Noticed::noticed)
      .def_readonly("all", &RaceDetector::Noticed::all);

  py::class_<RaceDetector, std::shared_ptr<RaceDetector>>(
      module, "RaceDetector",
      "Finds memory that two streams use at once, from what the streams are asked for.")
      .def(py::init<bool, bool>(), py::kw_only(), py::arg("keeps_trace"), py::arg("throws"))
      .def("watch", &watch,
           "Observes the streams of a runtime from here on, before their first use.",
           py::arg("streams"))
      .def("name_memory", &RaceDetector::name_memory, "Names memory in messages.",
           py::arg("tensor"), py::arg("name"))
      .def("access", &RaceDetector::access,
           "What the calling thread computes; `stream`: the handle of the device's current one.",
           py::arg("operation"), py::arg("reads"), py::arg("writes"), py::arg("stream"), Release())
      .def("made", &RaceDetector::made, "Tensors that an operator has made and written.",
           py::arg("operation"), py::arg("tensors"), py::arg("stream"), Release())
      .def("allocate", &RaceDetector::allocate, "A write of the stream that is current.",
           py::arg("address"), py::arg("nbytes"), py::arg("stream"))
      .def("free", &RaceDetector::free, "A write of the stream that was current at allocate().",
           py::arg("address"))
      .def("synchronize", &RaceDetector::synchronize,
           "The host has waited for the stream; None: for all.", py::arg("stream"))
      .def("record_event", &RaceDetector::record_event, "Of an event that the script has made.",
           py::arg("event"), py::arg("stream"))
      .def("wait_for_event", &RaceDetector::wait_for_event, "Of an event that the script has made.",
           py::arg("event"), py::arg("stream"))
      .def_property_readonly("races", &RaceDetector::races)
      .def_property_readonly("num_accesses", &RaceDetector::num_accesses)
      .def_property_readonly("moved_nbytes", &RaceDetector::moved_nbytes)
      .def("put_defects", &RaceDetector::put_defects,
           "Puts defects into the trace one at a time, and counts by kind which are noticed.",
           py::arg("stride"), py::arg("only") = "", Release());
}

}  // namespace mics
