#include "mics/model/cost_model.h"

#include <gtest/gtest.h>

#include <vector>

#include "mics/error.h"
#include "mics/shard_layout.h"

namespace mics {
namespace {

constexpr Residency kAll[] = {Residency::kShard, Residency::kBlock, Residency::kFull};

TEST(CountHops, EqualsTheRunThatKeepsNothing) {
  const HopCounts counts = count_hops({}, /*num_microsteps=*/4, /*replication_size=*/2);
  EXPECT_EQ(counts.gather_rail, 8);
  EXPECT_EQ(counts.gather_intra, 8);
  EXPECT_EQ(counts.reduce_rail, 4);
  EXPECT_EQ(counts.reduce_intra, 4);
  EXPECT_EQ(counts.replicate, 1);
}

TEST(CountHops, CrossesNodesOncePerStepWhenBlocksAreKept) {
  const ResidencySettings blocks{Residency::kShard, Residency::kBlock, Residency::kBlock};
  const HopCounts counts = count_hops(blocks, 4, 1);
  EXPECT_EQ(counts.gather_rail, 1);
  EXPECT_EQ(counts.gather_intra, 8);
  EXPECT_EQ(counts.reduce_rail, 1);
  EXPECT_EQ(counts.reduce_intra, 4);
  EXPECT_EQ(counts.replicate, 0);
}

TEST(CountHops, FollowsEachSettingInClosedForm) {
  for (int s = 1; s <= 5; ++s) {
    for (const Residency forward : kAll) {
      for (const Residency between : kAll) {
        for (const Residency gradient : kAll) {
          const HopCounts counts = count_hops({forward, between, gradient}, s, 1);
          const bool keeps_block = between != Residency::kShard;
          const int rail = keeps_block ? 1 : (forward == Residency::kShard ? 2 * s : s);
          const int intra =
              between == Residency::kFull ? 1 : (forward == Residency::kFull ? s : 2 * s);
          ASSERT_EQ(counts.gather_rail, rail);
          ASSERT_EQ(counts.gather_intra, intra);
          ASSERT_EQ(counts.reduce_intra, gradient == Residency::kFull ? 1 : s);
          ASSERT_EQ(counts.reduce_rail, gradient == Residency::kShard ? s : 1);
        }
      }
    }
  }
}

// Bytes a rank receives, by moving pieces one by one: from every rank of its rail what that rank
// has in its slot, then from every rank of its node each slot's chunks.
TEST(StepBytes, EqualAnExplicitExchangeForEveryWorldUpTo8) {
  const std::vector<ParameterShape> shapes = {{{5, 3}}, {{7}}, {{2, 2}}, {{1}}};
  for (int n = 1; n <= 8; ++n) {
    for (int per_node = 1; per_node <= n; ++per_node) {
      if (n % per_node != 0) continue;
      std::vector<std::string> nodes;
      for (int rank = 0; rank < n; ++rank) nodes.push_back(std::to_string(rank / per_node));
      for (const int p : Topology::legal_partition_sizes(n, per_node)) {
        const Topology topology({nodes, p});
        const ShardLayout layout(shapes, p, 4);
        const UnitSize unit{layout.shard_numel(),
                            layout.payload_numel(),
                            layout.shard_numel(),
                            layout.payload_numel(),
                            2,
                            4,
                            4};
        for (const Variant variant : {Variant::kFlat, Variant::kHierarchical}) {
          for (int s = 1; s <= 3; ++s) {
            const HopCounts hops = count_hops({}, s, n / p);
            const StepBytes bytes = step_bytes(unit, topology.shape(variant), n / p, hops);
            const Group rail = topology.rail_group(n - 1, variant);
            const Group intra = topology.intra_group(n - 1, variant);
            StepBytes moved;
            for (int gather = 0; gather < 2 * s; ++gather) {
              for (const int peer : rail) {
                if (peer != n - 1) moved.gather_rail += 2 * layout.shard_numel();
              }
              for (const int peer : intra) {
                if (peer == n - 1) continue;
                for (size_t slot = 0; slot < rail.size(); ++slot) {
                  for (int i = 0; i < layout.num_parameters(); ++i) {
                    moved.gather_intra += 2 * layout.parameter(i).chunk_numel;
                  }
                }
              }
            }
            // A reduction gives every peer the piece that a gather takes from it, in 4 bytes.
            ASSERT_EQ(bytes.gather_rail, moved.gather_rail);
            ASSERT_EQ(bytes.gather_intra, moved.gather_intra);
            ASSERT_EQ(bytes.reduce_rail, moved.gather_rail);
            ASSERT_EQ(bytes.reduce_intra, moved.gather_intra);
            const int64_t replicas = n / p;
            const int64_t piece = (layout.shard_numel() + replicas - 1) / replicas;
            ASSERT_EQ(bytes.replicate, replicas == 1 ? 0 : 2 * (replicas - 1) * piece * 4);
          }
        }
      }
    }
  }
}

Machine p3dn_like() { return {8, 1e-3, 1e-3, {5e-6, 128e9}, {50e-6, 11e9}}; }

TEST(CollectiveSeconds, AreTheFormulas) {
  const Machine machine = p3dn_like();
  EXPECT_DOUBLE_EQ(flat_seconds(machine, 8, 128e9), 7 * 5e-6 + 7.0 / 8);
  EXPECT_DOUBLE_EQ(flat_seconds(machine, 16, 11e9), 1e-3 + 14 * 5e-6 + 50e-6 + 15.0 / 16);
  EXPECT_DOUBLE_EQ(rail_hop_seconds(machine, 16, 11e9), 1e-3 + 50e-6 + 0.5);
  EXPECT_DOUBLE_EQ(rail_hop_seconds(machine, 8, 11e9), 0);
  EXPECT_DOUBLE_EQ(intra_hop_seconds(machine, 16, 128e9), 7 * 5e-6 + 7.0 / 8);
  EXPECT_EQ(flat_seconds(machine, 1, 1e9), 0);
}

TEST(CollectiveSeconds, HierarchicalMovesLessAcrossNodesThanFlat) {
  for (const int p : {16, 32, 64, 128}) {
    EXPECT_LT(rail_hop_seconds(p3dn_like(), p, 157e6), flat_seconds(p3dn_like(), p, 157e6));
  }
}

TEST(CollectiveSeconds, AllReduceOfShardsIsTheVolumeOfTheNode) {
  Machine machine = p3dn_like();
  machine.launch = machine.intra.latency = machine.inter.latency = 0;
  EXPECT_EQ(replicate_seconds(machine, 8, 1, 11e9), 0);
  EXPECT_DOUBLE_EQ(replicate_seconds(machine, 8, 16, 11e9), 2.0 * 15 / 16);
  EXPECT_DOUBLE_EQ(replicate_seconds(machine, 16, 8, 11e9), 2.0 * 7 / 8 * 8 / 16);
  // Two replicas on one node use its own links.
  EXPECT_DOUBLE_EQ(replicate_seconds(machine, 4, 2, 128e9), 0.25);
}

TEST(CollectiveSeconds, RefuseWhatCannotBe) {
  Machine machine = p3dn_like();
  EXPECT_THROW((void)flat_seconds(machine, 0, 1), InvalidArgument);
  EXPECT_THROW((void)flat_seconds(machine, 12, 1), InvalidArgument);
  EXPECT_THROW((void)flat_seconds(machine, 8, -1), InvalidArgument);
  EXPECT_THROW((void)replicate_seconds(machine, 8, 0, 1), InvalidArgument);
  EXPECT_THROW((void)replicate_seconds(machine, 4, 3, 1), InvalidArgument);
  machine.inter.bandwidth = 0;
  EXPECT_THROW((void)rail_hop_seconds(machine, 16, 1), InvalidArgument);
  EXPECT_THROW((void)count_hops({}, 0, 1), InvalidArgument);
  EXPECT_THROW((void)count_hops({}, 1, 0), InvalidArgument);
  EXPECT_THROW((void)step_bytes({}, {0, 1}, 1, {}), InvalidArgument);
}

}  // namespace
}  // namespace mics
