#include "mics/unit_collectives.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include "plan/check.h"

namespace mics {

namespace {

void check_block(const ShardLayout& layout, const at::Tensor& block, const HopCommunicators& hops) {
  MICS_CHECK(
      hops.num_nodes() * hops.ranks_per_node() == layout.partition_size(),
      "the communicators must have partition_size ranks together: got rail=", hops.num_nodes(),
      ", intra=", hops.ranks_per_node(), ", partition_size=", layout.partition_size(), ".");
  MICS_CHECK(block.numel() == hops.num_nodes() * layout.shard_numel(),
             "a node block has one slot of shard_numel per node: got numel=", block.numel(),
             ", num_nodes=", hops.num_nodes(), ", shard_numel=", layout.shard_numel(), ".");
}

// Rows of node `slot` in a region: those that its L ranks own of the parameter, in rank order.
at::Tensor node_rows(const at::Tensor& region, const ParameterLayout& parameter, int slot,
                     int ranks_per_node) {
  const int64_t numel = parameter.chunk_numel * ranks_per_node;
  if (numel == region.numel()) return region;
  return region.narrow(0, numel * slot, numel);
}

at::Tensor chunk(const at::Tensor& block, const ShardLayout& layout, int index, int slot) {
  const ParameterLayout& parameter = layout.parameter(index);
  return block.narrow(0, layout.shard_numel() * slot + parameter.shard_offset,
                      parameter.chunk_numel);
}

}  // namespace

at::Tensor own_slot(const ShardLayout& layout, const at::Tensor& block,
                    const HopCommunicators& hops) {
  return block.narrow(0, layout.shard_numel() * hops.slot(), layout.shard_numel());
}

// Views into buffers of the runtime. Nobody differentiates them or asks for their versions, and a
// view without that bookkeeping costs a third.
std::vector<TensorPair> gather_pairs(const ShardLayout& layout, const at::Tensor& block,
                                     const at::Tensor& full, const HopCommunicators& hops) {
  check_block(layout, block, hops);
  const at::AutoDispatchBelowADInplaceOrView no_bookkeeping;
  std::vector<TensorPair> pairs;
  for (int slot = 0; slot < hops.num_nodes(); ++slot) {
    for (int i = 0; i < layout.num_parameters(); ++i) {
      const ParameterLayout& parameter = layout.parameter(i);
      if (parameter.chunk_numel == 0) continue;
      const at::Tensor region = full.narrow(0, parameter.region_offset, parameter.region_numel);
      pairs.push_back({node_rows(region, parameter, slot, hops.ranks_per_node()),
                       chunk(block, layout, i, slot)});
    }
  }
  return pairs;
}

std::vector<TensorPair> reduce_pairs(const ShardLayout& layout,
                                     const std::vector<at::Tensor>& regions,
                                     const at::Tensor& block, const HopCommunicators& hops) {
  check_block(layout, block, hops);
  const at::AutoDispatchBelowADInplaceOrView no_bookkeeping;
  std::vector<TensorPair> pairs;
  for (int slot = 0; slot < hops.num_nodes(); ++slot) {
    for (int i = 0; i < layout.num_parameters(); ++i) {
      const ParameterLayout& parameter = layout.parameter(i);
      if (parameter.chunk_numel == 0) continue;
      pairs.push_back(
          {chunk(block, layout, i, slot),
           node_rows(regions[static_cast<size_t>(i)], parameter, slot, hops.ranks_per_node())});
    }
  }
  return pairs;
}

}  // namespace mics
