#include "mics/unit_collectives.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <array>

#include "support/local_hops.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::LocalHops;
using testing::run_ranks;

// Uneven rows, fewer rows than ranks, no rows, an odd row length.
const std::vector<ParameterShape>& shapes() {
  static const std::vector<ParameterShape> kShapes = {
      {{13, 3}}, {{2, 5}}, {{0, 4}}, {{7}}, {{16, 2}}};
  return kShapes;
}

struct Case {
  int num_nodes;
  int ranks_per_node;
  bool hierarchical;
};

class UnitCollectives : public ::testing::TestWithParam<Case> {
 protected:
  int partition_size() const { return GetParam().num_nodes * GetParam().ranks_per_node; }
  int num_hop_nodes() const { return GetParam().hierarchical ? GetParam().num_nodes : 1; }
  int hop_ranks() const { return partition_size() / num_hop_nodes(); }
  ShardLayout layout() const { return ShardLayout(shapes(), partition_size(), 4); }

  void on_ranks(const std::function<void(int, LocalHops&, Stream&)>& body) const {
    LocalWorld world(partition_size(), std::chrono::seconds(60));
    run_ranks(partition_size(), [&](int rank) {
      LocalHops hops(world, GetParam().num_nodes, GetParam().ranks_per_node,
                     GetParam().hierarchical, rank, "test");
      const auto stream = make_inline_stream();
      body(rank, hops, *stream);
    });
  }
};

at::Tensor full_parameter(int index) {
  const std::vector<int64_t>& sizes = shapes()[static_cast<size_t>(index)].sizes;
  return at::arange(c10::multiply_integers(sizes), at::kFloat).view(sizes) + 1000.0 * index;
}

at::Tensor shard_of(const ShardLayout& layout, int rank) {
  const at::Tensor shard = at::zeros({layout.shard_numel()});
  for (int i = 0; i < layout.num_parameters(); ++i) {
    const ShardLayout::RowRange rows = layout.rows_of(i, rank);
    const at::Tensor own = full_parameter(i).slice(0, rows.first, rows.last).flatten();
    shard.narrow(0, layout.parameter(i).shard_offset, own.numel()).copy_(own);
  }
  return shard;
}

void gather(const ShardLayout& layout, const at::Tensor& block, const at::Tensor& full,
            const HopCommunicators& hops, Stream& stream) {
  if (hops.rail != nullptr) hops.rail->all_gather(block, own_slot(layout, block, hops), stream);
  hops.intra->all_gather(gather_pairs(layout, block, full, hops), stream);
}

at::Tensor reduce(const ShardLayout& layout, const std::vector<at::Tensor>& regions,
                  const at::Tensor& block, const HopCommunicators& hops, Stream& stream) {
  hops.intra->reduce_scatter(reduce_pairs(layout, regions, block, hops), stream);
  const at::Tensor own = own_slot(layout, block, hops);
  if (hops.rail != nullptr) hops.rail->reduce_scatter(own, block, stream);
  return own;
}

TEST_P(UnitCollectives, GatherPutsEveryRowInNaturalOrder) {
  on_ranks([&](int rank, LocalHops& hops, Stream& stream) {
    const ShardLayout unit = layout();
    const at::Tensor block = at::full({num_hop_nodes() * unit.shard_numel()}, -7.0);
    block.narrow(0, hops.hops().slot() * unit.shard_numel(), unit.shard_numel())
        .copy_(shard_of(unit, rank));
    const at::Tensor full = at::full({unit.full_numel()}, -1.0);
    gather(unit, block, full, hops.hops(), stream);
    for (int i = 0; i < unit.num_parameters(); ++i) {
      const at::Tensor expected = full_parameter(i);
      const at::Tensor got = full.narrow(0, unit.parameter(i).region_offset, expected.numel());
      ASSERT_TRUE(at::equal(got.view(expected.sizes()), expected)) << "parameter " << i;
    }
  });
}

std::vector<at::Tensor> gradient_regions(const ShardLayout& layout, int rank) {
  std::vector<at::Tensor> regions;
  for (int i = 0; i < layout.num_parameters(); ++i) {
    const at::Tensor region = at::zeros({layout.parameter(i).region_numel});
    // Small integers: sums are exact in any order, so variants agree bitwise.
    const at::Tensor gradient = (full_parameter(i).flatten() * (rank + 1)).remainder(64.0);
    region.narrow(0, 0, gradient.numel()).copy_(gradient);
    regions.push_back(region);
  }
  return regions;
}

TEST_P(UnitCollectives, ReduceGivesEachRankItsRowsOfTheSum) {
  on_ranks([&](int rank, LocalHops& hops, Stream& stream) {
    const ShardLayout unit = layout();
    const at::Tensor block = at::zeros({num_hop_nodes() * unit.shard_numel()});
    const at::Tensor own = reduce(unit, gradient_regions(unit, rank), block, hops.hops(), stream);
    for (int i = 0; i < unit.num_parameters(); ++i) {
      at::Tensor sum = at::zeros({unit.parameter(i).region_numel});
      for (int other = 0; other < partition_size(); ++other) {
        sum += gradient_regions(unit, other)[static_cast<size_t>(i)];
      }
      const int64_t numel = unit.parameter(i).chunk_numel;
      ASSERT_TRUE(at::equal(own.narrow(0, unit.parameter(i).shard_offset, numel),
                            sum.narrow(0, rank * numel, numel)))
          << "parameter " << i;
    }
  });
}

TEST_P(UnitCollectives, BytesEqualTheFormulas) {
  std::vector<Traffic> rails(static_cast<size_t>(partition_size()));
  std::vector<Traffic> intras(static_cast<size_t>(partition_size()));
  const ShardLayout unit = layout();
  for (const bool is_gather : {true, false}) {
    on_ranks([&](int rank, LocalHops& hops, Stream& stream) {
      const at::Tensor block = at::zeros({num_hop_nodes() * unit.shard_numel()});
      if (is_gather) {
        gather(unit, block, at::zeros({unit.full_numel()}), hops.hops(), stream);
      } else {
        (void)reduce(unit, gradient_regions(unit, rank), block, hops.hops(), stream);
      }
      rails[static_cast<size_t>(rank)] = hops.rail();
      intras[static_cast<size_t>(rank)] = hops.intra();
    });
    const int64_t element = 4;
    const int64_t s = unit.shard_numel() * element;
    const int64_t q = unit.payload_numel() * element;
    const int64_t n = num_hop_nodes();
    const int64_t l = hop_ranks();
    int64_t node_0_received_inter = 0;
    for (int rank = 0; rank < partition_size(); ++rank) {
      const Traffic& rail = rails[static_cast<size_t>(rank)];
      const Traffic& intra = intras[static_cast<size_t>(rank)];
      ASSERT_EQ(rail.received_inter_nbytes, (n - 1) * s);
      ASSERT_EQ(rail.received_intra_nbytes, 0);
      ASSERT_EQ(intra.received_intra_nbytes + intra.received_inter_nbytes, n * (l - 1) * q);
      ASSERT_EQ(intra.sent_intra_nbytes + intra.sent_inter_nbytes, n * (l - 1) * q);
      if (GetParam().hierarchical) {
        ASSERT_EQ(intra.received_inter_nbytes, 0);
      }
      if (rank < GetParam().ranks_per_node) {
        node_0_received_inter += rail.received_inter_nbytes + intra.received_inter_nbytes;
      }
    }
    if (GetParam().hierarchical) {
      ASSERT_EQ(node_0_received_inter, (partition_size() - GetParam().ranks_per_node) * s);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Local, UnitCollectives,
                         ::testing::Values(Case{1, 1, true}, Case{1, 2, true}, Case{1, 5, false},
                                           Case{2, 1, true}, Case{2, 2, true}, Case{2, 2, false},
                                           Case{2, 4, true}, Case{4, 2, true}, Case{4, 2, false},
                                           Case{3, 2, true}, Case{2, 3, true}, Case{8, 1, true}),
                         [](const auto& info) {
                           return std::to_string(info.param.num_nodes) + "nodes_" +
                                  std::to_string(info.param.ranks_per_node) + "ranks_" +
                                  (info.param.hierarchical ? "hierarchical" : "flat");
                         });

}  // namespace
}  // namespace mics
