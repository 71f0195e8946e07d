// Topology: which ranks share a copy of the model states, and who talks to whom (docs/concepts.md).
//
//   world of 8 ranks, 2 per node (L = 2), partition_size p = 4, replication_size R = 2
//
//            node 0    node 1    node 2    node 3
//   local 0  r0        r2        r4        r6         partition group 0 = {r0 r1 r2 r3}
//   local 1  r1        r3        r5        r7         partition group 1 = {r4 r5 r6 r7}
//
//   r0: intra group {r0 r1}   ranks of the partition group on this node      L ranks
//       rail group  {r0 r2}   ranks of the partition group of equal local    N ranks
//       replication group {r0 r4}   ranks that hold the same shard           R ranks
//
// Pure arithmetic: no I/O, no threads. Every rank computes the same groups from the same input.
// Source: MiCS paper section 3 (groups); the names are those of docs/concepts.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mics {

// Ranks of the world in ascending order.
using Group = std::vector<int>;

struct TopologyOptions {
  // Node of each world rank: `node_of_rank[r]` is any string that is equal exactly for ranks of one
  // host. Its length is the world size.
  std::vector<std::string> node_of_rank;
  // Ranks that share one copy of the model states; divides the world size.
  int partition_size = 1;
};

// The two ways to run the collectives of a partition group that spans nodes.
enum class Variant {
  kFlat,          // one collective over all partition_size ranks
  kHierarchical,  // across nodes first, inside the node second (reduce: the other way round)
};

[[nodiscard]] const char* to_string(Variant variant);

// Immutable after construction; safe to share between threads.
class Topology {
 public:
  // Throws InvalidArgument when partition_size does not divide the world size, or, on nodes of
  // equal size with consecutive ranks, neither divides ranks_per_node nor is a multiple of it. The
  // message lists the legal sizes. Nodes that are uneven or interleaved are accepted here (flat
  // collectives need no nodes); hierarchical_error() then says why the hierarchical variant is not
  // available.
  explicit Topology(const TopologyOptions& options);

  // Every partition_size legal for this world: divisors of world_size that divide ranks_per_node or
  // are multiples of it. `ranks_per_node` <= 0 means irregular nodes: all divisors.
  [[nodiscard]] static std::vector<int> legal_partition_sizes(int world_size, int ranks_per_node);

  [[nodiscard]] int world_size() const { return world_size_; }
  [[nodiscard]] int partition_size() const { return partition_size_; }
  [[nodiscard]] int replication_size() const { return world_size_ / partition_size_; }
  [[nodiscard]] int num_nodes() const { return static_cast<int>(node_names_.size()); }
  // L; 0 when nodes differ in size or hold ranks that are not consecutive.
  [[nodiscard]] int ranks_per_node() const { return ranks_per_node_; }
  // Index of the node of `world_rank`, numbered in order of first appearance.
  [[nodiscard]] int node_of(int world_rank) const;

  // Which partition group, and which member of it.
  [[nodiscard]] int partition_index(int world_rank) const;
  [[nodiscard]] int partition_rank(int world_rank) const;

  [[nodiscard]] Group partition_group(int world_rank) const;
  [[nodiscard]] Group replication_group(int world_rank) const;
  // All partition groups, then all replication groups, in ascending order of their first rank.
  [[nodiscard]] std::vector<Group> partition_groups() const;
  [[nodiscard]] std::vector<Group> replication_groups() const;

  // N and L of the collectives of one partition group: flat is (1, partition_size); hierarchical is
  // (nodes of the group, its ranks per node). A group inside one node is (1, partition_size) in
  // both.
  struct Shape {
    int num_nodes = 1;       // N
    int ranks_per_node = 1;  // L
  };
  [[nodiscard]] Shape shape(Variant variant) const;

  // Hop-2 group of a gather: the ranks of this partition group on this rank's node (hierarchical),
  // or the whole partition group (flat).
  [[nodiscard]] Group intra_group(int world_rank, Variant variant) const;
  // Hop-1 group of a gather: the ranks of equal local index, one per node; {world_rank} when N = 1.
  [[nodiscard]] Group rail_group(int world_rank, Variant variant) const;
  [[nodiscard]] std::vector<Group> intra_groups(Variant variant) const;
  [[nodiscard]] std::vector<Group> rail_groups(Variant variant) const;

  // Empty when the hierarchical variant can be used; else the reason with the map of ranks to
  // nodes.
  [[nodiscard]] const std::string& hierarchical_error() const { return hierarchical_error_; }
  // True when a partition group has ranks on more than one node.
  [[nodiscard]] bool spans_nodes() const;

  // "8 ranks on 4 nodes: node 0 [r0 r1], ..."; what messages and reports print.
  [[nodiscard]] std::string describe_nodes() const;

 private:
  void check_rank(int world_rank) const;

  // Constant after construction.
  int world_size_;
  int partition_size_;
  int ranks_per_node_ = 0;
  std::vector<int> node_of_rank_;
  std::vector<std::string> node_names_;
  std::string hierarchical_error_;
};

}  // namespace mics
