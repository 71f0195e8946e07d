#include "mics/topology.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <set>
#include <string>

#include "mics/error.h"

namespace mics {
namespace {

std::vector<std::string> regular_nodes(int world_size, int ranks_per_node) {
  std::vector<std::string> nodes;
  for (int rank = 0; rank < world_size; ++rank) {
    nodes.push_back("host" + std::to_string(rank / ranks_per_node));
  }
  return nodes;
}

std::string message_of(const std::function<void()>& body) {
  try {
    body();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

// Disjoint, covering, and the same seen from every member.
void expect_is_partition_of_world(int world_size, const std::vector<Group>& groups,
                                  const std::function<Group(int)>& group_of) {
  std::set<int> seen;
  for (const Group& group : groups) {
    ASSERT_TRUE(std::is_sorted(group.begin(), group.end()));
    for (const int rank : group) {
      ASSERT_TRUE(seen.insert(rank).second) << "rank " << rank << " is in two groups";
      ASSERT_EQ(group_of(rank), group) << "seen from rank " << rank;
    }
  }
  ASSERT_EQ(static_cast<int>(seen.size()), world_size);
}

void check_world(int n, int ranks_per_node, int p) {
  const Topology topology({regular_nodes(n, ranks_per_node), p});
  ASSERT_EQ(topology.ranks_per_node(), ranks_per_node);
  ASSERT_EQ(topology.replication_size() * p, n);
  expect_is_partition_of_world(n, topology.partition_groups(),
                               [&](int rank) { return topology.partition_group(rank); });
  expect_is_partition_of_world(n, topology.replication_groups(),
                               [&](int rank) { return topology.replication_group(rank); });
  for (const Variant variant : {Variant::kFlat, Variant::kHierarchical}) {
    expect_is_partition_of_world(n, topology.intra_groups(variant),
                                 [&](int rank) { return topology.intra_group(rank, variant); });
    expect_is_partition_of_world(n, topology.rail_groups(variant),
                                 [&](int rank) { return topology.rail_group(rank, variant); });
    const Topology::Shape shape = topology.shape(variant);
    ASSERT_EQ(shape.num_nodes * shape.ranks_per_node, p);
    for (int rank = 0; rank < n; ++rank) {
      const Group partition = topology.partition_group(rank);
      const Group intra = topology.intra_group(rank, variant);
      const Group rail = topology.rail_group(rank, variant);
      ASSERT_EQ(static_cast<int>(intra.size()), shape.ranks_per_node);
      ASSERT_EQ(static_cast<int>(rail.size()), shape.num_nodes);
      ASSERT_EQ(partition[static_cast<size_t>(topology.partition_rank(rank))], rank);
      ASSERT_TRUE(std::includes(partition.begin(), partition.end(), intra.begin(), intra.end()));
      ASSERT_TRUE(std::includes(partition.begin(), partition.end(), rail.begin(), rail.end()));
      // r = m * L + l: the place in the intra group is l, in the rail group m.
      const auto l = std::find(intra.begin(), intra.end(), rank) - intra.begin();
      const auto m = std::find(rail.begin(), rail.end(), rank) - rail.begin();
      ASSERT_EQ(topology.partition_rank(rank), m * shape.ranks_per_node + l);
      if (variant == Variant::kHierarchical) {
        for (const int other : intra) ASSERT_EQ(topology.node_of(other), topology.node_of(rank));
        std::set<int> nodes;
        for (const int other : rail) nodes.insert(topology.node_of(other));
        ASSERT_EQ(static_cast<int>(nodes.size()), shape.num_nodes);
      }
      const Group replicas = topology.replication_group(rank);
      for (const int other : replicas) {
        ASSERT_EQ(topology.partition_rank(other), topology.partition_rank(rank));
      }
    }
  }
  ASSERT_EQ(topology.spans_nodes(), p > ranks_per_node);
}

TEST(Topology, GroupsHoldTheirAxiomsForEveryWorldUpTo64) {
  int num_worlds = 0;
  for (int n = 1; n <= 64; ++n) {
    for (int ranks_per_node = 1; ranks_per_node <= n; ++ranks_per_node) {
      if (n % ranks_per_node != 0) continue;
      for (const int p : Topology::legal_partition_sizes(n, ranks_per_node)) {
        check_world(n, ranks_per_node, p);
        if (HasFatalFailure()) FAIL() << "n=" << n << " L=" << ranks_per_node << " p=" << p;
        ++num_worlds;
      }
    }
  }
  EXPECT_GT(num_worlds, 1000);
}

TEST(Topology, RefusesEveryIllegalSizeUpTo64AndListsTheLegalOnes) {
  for (int n = 1; n <= 64; ++n) {
    for (int ranks_per_node = 1; ranks_per_node <= n; ++ranks_per_node) {
      if (n % ranks_per_node != 0) continue;
      const std::vector<int> legal = Topology::legal_partition_sizes(n, ranks_per_node);
      for (int p = -1; p <= n + 1; ++p) {
        if (std::find(legal.begin(), legal.end(), p) != legal.end()) continue;
        EXPECT_THROW(Topology({regular_nodes(n, ranks_per_node), p}), InvalidArgument)
            << "n=" << n << " L=" << ranks_per_node << " p=" << p;
      }
    }
  }
  const std::string text = message_of([] { Topology({regular_nodes(12, 4), 8}); });
  EXPECT_EQ(
      text,
      "partition_size must divide world_size: got partition_size=8, world_size=12. Use 1, 2, 4 or "
      "12.");
  const std::string nodes = message_of([] { Topology({regular_nodes(12, 4), 6}); });
  EXPECT_NE(nodes.find("must divide the ranks per node or be a multiple of it"), std::string::npos);
  EXPECT_NE(nodes.find("Use 1, 2, 4 or 12."), std::string::npos);
}

TEST(Topology, InterleavedNodesAllowFlatAndExplainWhyNotHierarchical) {
  const Topology topology({{"a", "b", "a", "b"}, 2});
  EXPECT_EQ(topology.ranks_per_node(), 0);
  EXPECT_EQ(topology.shape(Variant::kFlat).ranks_per_node, 2);
  EXPECT_NE(topology.hierarchical_error().find("node 0 (a) [r0 r2], node 1 (b) [r1 r3]"),
            std::string::npos);
  EXPECT_THROW((void)topology.shape(Variant::kHierarchical), InvalidArgument);
}

TEST(Topology, UnevenNodesAllowFlat) {
  const Topology topology({{"a", "a", "a", "b"}, 4});
  EXPECT_EQ(topology.ranks_per_node(), 0);
  EXPECT_TRUE(topology.spans_nodes());
  EXPECT_EQ(topology.intra_group(2, Variant::kFlat), (Group{0, 1, 2, 3}));
}

TEST(Topology, NodesAreKnownByIdentityAndNotByPosition) {
  const Topology topology({{"z", "z", "a", "a"}, 4});
  EXPECT_EQ(topology.ranks_per_node(), 2);
  EXPECT_EQ(topology.rail_group(1, Variant::kHierarchical), (Group{1, 3}));
}

}  // namespace
}  // namespace mics
