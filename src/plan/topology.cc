#include "mics/topology.h"

#include <algorithm>
#include <map>
#include <sstream>

#include "plan/check.h"

namespace mics {

const char* to_string(Variant variant) {
  switch (variant) {
    case Variant::kFlat:
      return "flat";
    case Variant::kHierarchical:
      return "hierarchical";
  }
  return "unknown";
}

namespace {

// L, the ranks per node, if every node holds as many consecutive ranks; else 0.
int find_ranks_per_node(const std::vector<int>& node_of_rank, int num_nodes) {
  const int world_size = static_cast<int>(node_of_rank.size());
  if (world_size % num_nodes != 0) return 0;
  const int ranks_per_node = world_size / num_nodes;
  for (int rank = 0; rank < world_size; ++rank) {
    // Nodes are numbered by first appearance, so a regular map is exactly rank / L.
    if (node_of_rank[static_cast<size_t>(rank)] != rank / ranks_per_node) return 0;
  }
  return ranks_per_node;
}

// Distinct groups of all ranks, by first member. `group_of` must give all members of a group the
// same group.
template <typename GroupOf>
std::vector<Group> distinct_groups(int world_size, const GroupOf& group_of) {
  std::vector<Group> groups;
  for (int rank = 0; rank < world_size; ++rank) {
    Group group = group_of(rank);
    if (group.front() == rank) groups.push_back(std::move(group));
  }
  return groups;
}

}  // namespace

std::vector<int> Topology::legal_partition_sizes(int world_size, int ranks_per_node) {
  std::vector<int> sizes;
  for (int p = 1; p <= world_size; ++p) {
    if (world_size % p != 0) continue;
    const bool fits_nodes =
        ranks_per_node <= 0 || ranks_per_node % p == 0 || p % ranks_per_node == 0;
    if (fits_nodes) sizes.push_back(p);
  }
  return sizes;
}

Topology::Topology(const TopologyOptions& options)
    : world_size_(static_cast<int>(options.node_of_rank.size())),
      partition_size_(options.partition_size) {
  MICS_CHECK(world_size_ >= 1,
             "the world must have at least one rank: got node_of_rank of length 0.");
  std::map<std::string, int> index_of_node;
  for (const std::string& name : options.node_of_rank) {
    const auto [entry, is_new] =
        index_of_node.emplace(name, static_cast<int>(index_of_node.size()));
    if (is_new) node_names_.push_back(name);
    node_of_rank_.push_back(entry->second);
  }
  ranks_per_node_ = find_ranks_per_node(node_of_rank_, num_nodes());

  const std::vector<int> legal = legal_partition_sizes(world_size_, ranks_per_node_);
  MICS_CHECK(partition_size_ >= 1,
             "partition_size must be at least 1: got partition_size=", partition_size_,
             ", world_size=", world_size_, ". Use ", join_or(legal), ".");
  MICS_CHECK(world_size_ % partition_size_ == 0,
             "partition_size must divide world_size: got partition_size=", partition_size_,
             ", world_size=", world_size_, ". Use ", join_or(legal), ".");
  MICS_CHECK(std::find(legal.begin(), legal.end(), partition_size_) != legal.end(),
             "partition_size must divide the ranks per node or be a multiple of it: got "
             "partition_size=",
             partition_size_, ", ranks_per_node=", ranks_per_node_, ", world_size=", world_size_,
             ". Use ", join_or(legal), ".");
  if (ranks_per_node_ == 0) {
    hierarchical_error_ = detail::concatenate(
        "the hierarchical variant needs nodes of equal size whose ranks are consecutive: got ",
        describe_nodes(),
        ". Start the ranks node by node (torchrun does), or use hierarchical_gather=False.");
  }
}

void Topology::check_rank(int world_rank) const {
  MICS_CHECK(world_rank >= 0 && world_rank < world_size_,
             "a world_rank must be in [0, world_size): got world_rank=", world_rank,
             ", world_size=", world_size_, ".");
}

int Topology::node_of(int world_rank) const {
  check_rank(world_rank);
  return node_of_rank_[static_cast<size_t>(world_rank)];
}

int Topology::partition_index(int world_rank) const {
  check_rank(world_rank);
  return world_rank / partition_size_;
}

int Topology::partition_rank(int world_rank) const {
  check_rank(world_rank);
  return world_rank % partition_size_;
}

Group Topology::partition_group(int world_rank) const {
  const int first = partition_index(world_rank) * partition_size_;
  Group group;
  for (int rank = first; rank < first + partition_size_; ++rank) group.push_back(rank);
  return group;
}

Group Topology::replication_group(int world_rank) const {
  Group group;
  for (int rank = partition_rank(world_rank); rank < world_size_; rank += partition_size_) {
    group.push_back(rank);
  }
  return group;
}

std::vector<Group> Topology::partition_groups() const {
  return distinct_groups(world_size_, [&](int rank) { return partition_group(rank); });
}

std::vector<Group> Topology::replication_groups() const {
  return distinct_groups(world_size_, [&](int rank) { return replication_group(rank); });
}

bool Topology::spans_nodes() const {
  for (int rank = 0; rank < world_size_; ++rank) {
    const int first = partition_index(rank) * partition_size_;
    if (node_of_rank_[static_cast<size_t>(rank)] != node_of_rank_[static_cast<size_t>(first)]) {
      return true;
    }
  }
  return false;
}

Topology::Shape Topology::shape(Variant variant) const {
  if (variant == Variant::kFlat) return {1, partition_size_};
  MICS_CHECK(hierarchical_error_.empty(), hierarchical_error_);
  if (partition_size_ <= ranks_per_node_) return {1, partition_size_};
  return {partition_size_ / ranks_per_node_, ranks_per_node_};
}

Group Topology::intra_group(int world_rank, Variant variant) const {
  const Shape shape_of_group = shape(variant);
  const int first = world_rank - partition_rank(world_rank) % shape_of_group.ranks_per_node;
  Group group;
  for (int local = 0; local < shape_of_group.ranks_per_node; ++local)
    group.push_back(first + local);
  return group;
}

Group Topology::rail_group(int world_rank, Variant variant) const {
  const Shape shape_of_group = shape(variant);
  const int local = partition_rank(world_rank) % shape_of_group.ranks_per_node;
  const int first = partition_index(world_rank) * partition_size_ + local;
  Group group;
  for (int node = 0; node < shape_of_group.num_nodes; ++node) {
    group.push_back(first + node * shape_of_group.ranks_per_node);
  }
  return group;
}

std::vector<Group> Topology::intra_groups(Variant variant) const {
  return distinct_groups(world_size_, [&](int rank) { return intra_group(rank, variant); });
}

std::vector<Group> Topology::rail_groups(Variant variant) const {
  return distinct_groups(world_size_, [&](int rank) { return rail_group(rank, variant); });
}

std::string Topology::describe_nodes() const {
  std::ostringstream out;
  out << world_size_ << " ranks on " << num_nodes() << " nodes:";
  for (int node = 0; node < num_nodes(); ++node) {
    out << (node > 0 ? "," : "") << " node " << node << " ("
        << node_names_[static_cast<size_t>(node)] << ") [";
    const char* separator = "";
    for (int rank = 0; rank < world_size_; ++rank) {
      if (node_of_rank_[static_cast<size_t>(rank)] != node) continue;
      out << separator << "r" << rank;
      separator = " ";
    }
    out << "]";
  }
  return out.str();
}

}  // namespace mics
