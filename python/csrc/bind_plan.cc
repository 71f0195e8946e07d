#include <pybind11/stl.h>

#include "bindings.h"
#include "mics/shard_layout.h"
#include "mics/topology.h"

namespace py = pybind11;

namespace mics {

void bind_plan(py::module_& module) {
  py::enum_<Variant>(module, "Variant",
                     "How the collectives of a partition group over several nodes run.")
      .value("FLAT", Variant::kFlat)
      .value("HIERARCHICAL", Variant::kHierarchical);

  py::class_<Topology>(
      module, "Topology",
      "The groups of every rank, from the nodes of the ranks and the partition size.")
      .def(py::init([](std::vector<std::string> node_of_rank, int partition_size) {
             return Topology({std::move(node_of_rank), partition_size});
           }),
           py::kw_only(), py::arg("node_of_rank"), py::arg("partition_size"))
      .def_static("legal_partition_sizes", &Topology::legal_partition_sizes,
                  "Every legal partition size; `ranks_per_node` 0: irregular nodes.",
                  py::arg("world_size"), py::arg("ranks_per_node"))
      .def_property_readonly("world_size", &Topology::world_size)
      .def_property_readonly("partition_size", &Topology::partition_size)
      .def_property_readonly("replication_size", &Topology::replication_size)
      .def_property_readonly("num_nodes", &Topology::num_nodes)
      .def_property_readonly("ranks_per_node", &Topology::ranks_per_node)
      .def_property_readonly("spans_nodes", &Topology::spans_nodes)
      .def_property_readonly("hierarchical_error", &Topology::hierarchical_error)
      .def("node_of", &Topology::node_of, "Index of the node of a rank.", py::arg("world_rank"))
      .def("partition_index", &Topology::partition_index, "Which partition group the rank is in.",
           py::arg("world_rank"))
      .def("partition_rank", &Topology::partition_rank,
           "Which member of its partition group the rank is.", py::arg("world_rank"))
      .def("partition_group", &Topology::partition_group,
           "Ranks that share one copy of the model states with the rank.", py::arg("world_rank"))
      .def("replication_group", &Topology::replication_group,
           "Ranks that hold the same shard as the rank.", py::arg("world_rank"))
      .def("intra_group", &Topology::intra_group, "Ranks of hop 2 of a gather.",
           py::arg("world_rank"), py::arg("variant"))
      .def("rail_group", &Topology::rail_group, "Ranks of hop 1 of a gather.",
           py::arg("world_rank"), py::arg("variant"))
      .def("partition_groups", &Topology::partition_groups, "All partition groups.")
      .def("replication_groups", &Topology::replication_groups, "All replication groups.")
      .def("intra_groups", &Topology::intra_groups, "The hop-2 groups of all ranks.",
           py::arg("variant"))
      .def("rail_groups", &Topology::rail_groups, "The hop-1 groups of all ranks.",
           py::arg("variant"))
      .def("describe_nodes", &Topology::describe_nodes,
           "The map of ranks to nodes, as messages print it.");

  py::class_<ParameterLayout>(module, "ParameterLayout",
                              "Where one parameter lies; offsets and lengths in elements.")
      .def_readonly("num_rows", &ParameterLayout::num_rows)
      .def_readonly("row_numel", &ParameterLayout::row_numel)
      .def_readonly("chunk_rows", &ParameterLayout::chunk_rows)
      .def_readonly("chunk_numel", &ParameterLayout::chunk_numel)
      .def_readonly("shard_offset", &ParameterLayout::shard_offset);

  py::class_<ShardLayout>(module, "ShardLayout",
                          "Where the parameters of a unit lie in its shard and in its full buffer.")
      .def(py::init([](const std::vector<std::vector<int64_t>>& sizes, int partition_size,
                       int64_t alignment) {
             std::vector<ParameterShape> shapes;
             for (const std::vector<int64_t>& size : sizes) shapes.push_back({size});
             return ShardLayout(shapes, partition_size, alignment);
           }),
           py::arg("sizes"), py::kw_only(), py::arg("partition_size"), py::arg("alignment"))
      .def_property_readonly("shard_numel", &ShardLayout::shard_numel)
      .def_property_readonly("payload_numel", &ShardLayout::payload_numel)
      .def_property_readonly("full_numel", &ShardLayout::full_numel)
      .def_property_readonly("parameter_numel", &ShardLayout::parameter_numel)
      .def_property_readonly("num_parameters", &ShardLayout::num_parameters)
      .def("parameter", &ShardLayout::parameter, "Where parameter `index` lies.", py::arg("index"))
      .def(
          "rows_of",
          [](const ShardLayout& layout, int index, int partition_rank) {
            const ShardLayout::RowRange rows = layout.rows_of(index, partition_rank);
            return std::make_pair(rows.first, rows.last);
          },
          "Rows [first, last) that a rank owns of a parameter.", py::arg("index"),
          py::arg("partition_rank"));
}

}  // namespace mics
