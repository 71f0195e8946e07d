// The two collectives of a unit: gather its full parameters, reduce its full gradients.
//
// One algorithm for every topology, with N nodes of L ranks in the partition group. A *node block*
// has N slots of S elements (S = layout.shard_numel()); slot m of rank (m, l) is its own shard.
//
//   gather   hop 1  rail (N ranks)    one all-gather of the shards into the block
//            hop 2  intra (L ranks)   per slot m' and parameter i, as one group:
//                                     chunk i of block[m'] -> rows of node m' in region i
//   reduce   hop 1  intra (L ranks)   per slot m' and parameter i, as one group:
//                                     rows of node m' in region i, summed -> chunk i of block[m']
//            hop 2  rail (N ranks)    one reduce-scatter of the block: rank (m, l) gets slot m
//
//   p = 4 = 2 nodes x 2 ranks, parameter A of 4 rows        . = not there yet
//            rank (0,0)   (0,1)     (1,0)     (1,1)
//   block    [A0 .]       [A1 .]    [. A2]    [. A3]
//   hop 1    [A0 A2]      [A1 A3]   [A0 A2]   [A1 A3]
//   hop 2    [A0 A1 A2 A3] in the region of every rank: natural order, nothing is moved again
//
// N = 1 is a group inside one node, and also the flat variant of a group over several nodes (L = p):
// there are no rail hops, and the block is the shard.
//
// A rail hop is one pair of whole buffers. The functions here make the pairs of the intra hops; they
// are valid as long as the buffers stay where they are.
//
// Cost per rank, in elements, with Q = layout.payload_numel():
//   gather and reduce   rail (N-1)*S   intra N*(L-1)*Q       flat: (p-1)*Q
// Over one node's network link: L*(N-1)*S = (p-L)*S when hierarchical.
// Source: MiCS paper section 3.3; its data movement step is not needed here, because hop 2 reads
// the block chunk by chunk.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "mics/communicator.h"
#include "mics/shard_layout.h"

namespace mics {

// Both communicators of one direction. `rail` may be null when the group has one node.
struct HopCommunicators {
  Communicator* rail = nullptr;
  Communicator* intra = nullptr;
  [[nodiscard]] int num_nodes() const { return rail == nullptr ? 1 : rail->group().size(); }
  [[nodiscard]] int ranks_per_node() const { return intra->group().size(); }
  // This rank's slot m of a node block.
  [[nodiscard]] int slot() const { return rail == nullptr ? 0 : rail->group().rank; }
};

// This rank's slot of a node block, [S].
[[nodiscard]] at::Tensor own_slot(const ShardLayout& layout, const at::Tensor& block,
                                  const HopCommunicators& hops);

// Pairs of the intra all-gather, hop 2 of a gather.
//
//   block   [N * S]        all slots filled; with N = 1 it may be the shard itself
//   full    [full_numel]   every region is written, its padding rows included
//
// Both of one dtype. Empty when no parameter has elements. Throws InvalidArgument when block,
// layout and communicators do not fit together.
[[nodiscard]] std::vector<TensorPair> gather_pairs(const ShardLayout& layout,
                                                   const at::Tensor& block, const at::Tensor& full,
                                                   const HopCommunicators& hops);

// Pairs of the intra reduce-scatter, hop 1 of a reduction.
//
//   regions  one per parameter, [region_numel]: the gradient in its first rows; padding rows are
//            summed into padding and must hold numbers. Read only.
//   block    [N * S]  the chunks are written; the layout's alignment gaps are not
//
// Dtype, errors: as gather_pairs.
[[nodiscard]] std::vector<TensorPair> reduce_pairs(const ShardLayout& layout,
                                                   const std::vector<at::Tensor>& regions,
                                                   const at::Tensor& block,
                                                   const HopCommunicators& hops);

}  // namespace mics
