// The two collectives of a unit: gather its full parameters, reduce its full gradients.
//
// One algorithm for every topology, with N nodes of L ranks in the partition group. A *node block*
// has N slots of S elements (S = layout.shard_numel()); slot m of rank (m, l) is its own shard.
//
//   gather   hop 1  rail (N ranks)    one in-place all-gather of the block: slot m -> all slots
//            hop 2  intra (L ranks)   per slot m' and parameter i, as one group:
//                                     chunk i of block[m'] -> rows of node m' in region i
//   reduce   hop 1  intra (L ranks)   per slot m' and parameter i, as one group:
//                                     rows of node m' in region i, summed -> chunk i of block[m']
//            hop 2  rail (N ranks)    one in-place reduce-scatter of the block -> slot m
//
//   p = 4 = 2 nodes x 2 ranks, parameter A of 4 rows        . = not there yet
//            rank (0,0)   (0,1)     (1,0)     (1,1)
//   block    [A0 .]       [A1 .]    [. A2]    [. A3]
//   hop 1    [A0 A2]      [A1 A3]   [A0 A2]   [A1 A3]
//   hop 2    [A0 A1 A2 A3] in the region of every rank: natural order, nothing is moved again
//
// N = 1 is a group inside one node, and also the flat variant of a group over several nodes (L =
// p): hop 1 vanishes and the block is the shard.
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

// Gathers the full parameters.
//
//   block   [N * S]        this rank's shard in slot m; with N = 1 it may be the shard itself,
//   which is
//                          only read. All slots are filled on return.
//   full    [full_numel]   every region is written, its padding rows included
//
// Both of one dtype. Queued on `stream`; see Communicator for order, lifetime and errors.
void gather_unit(const ShardLayout& layout, const at::Tensor& block, const at::Tensor& full,
                 const HopCommunicators& hops, Stream& stream);

// Reduces full gradients to this rank's shard of their sum over the partition group.
//
//   regions  one per parameter, [region_numel]: the gradient in its first rows; padding rows are
//            summed into padding and must hold numbers. Read only.
//   block    [N * S]  scratch; on return slot m is the sum, with the layout's alignment gaps
//   untouched
//
// All of one dtype. Returns slot m of `block`. Queued on `stream`.
[[nodiscard]] at::Tensor reduce_unit(const ShardLayout& layout,
                                     const std::vector<at::Tensor>& regions,
                                     const at::Tensor& block, const HopCommunicators& hops,
                                     Stream& stream);

}  // namespace mics
