// ShardLayout: where each parameter of a unit lies in its shard buffer and in its full buffer.
//
// Parameter i has D_i rows of e_i elements (a 0-dim parameter is one row of one element). With p
// ranks it is cut like torch.chunk: c_i = ceil(D_i / p) rows per rank, q_i = c_i * e_i elements;
// rank r owns rows [r*c_i, min((r+1)*c_i, D_i)), maybe none.
//
//   unit with parameters A (4 rows), B (2 rows), p = 4
//   shard of rank 0: [A0 B0]  rank 1: [A1 B1]  rank 2: [A2 --]  rank 3: [A3 --]     -- = padding
//   full buffer (every rank, while unsharded): [A0 A1 A2 A3 | B0 B1 -- --]
//
// Invariants:
//  1. A chunk starts at a multiple of `alignment` elements of the shard buffer; so does a region of
//     the full buffer. Chunks and regions do not overlap and are in parameter order.
//  2. Region i holds p chunks of q_i elements in rank order, so rows are in natural order. The full
//     parameter is its first D_i rows: a contiguous view, never copied out.
//  3. A shard buffer has the same length on every rank, padded where a rank has fewer rows.
//
// Pure arithmetic: no torch, no memory is touched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mics {

// Shape of one parameter as the layout sees it.
struct ParameterShape {
  std::vector<int64_t> sizes;  // as torch: {} is 0-dim
};

// One parameter's place. All offsets and lengths are in elements.
struct ParameterLayout {
  int64_t num_rows = 0;       // D
  int64_t row_numel = 0;      // e
  int64_t chunk_rows = 0;     // c
  int64_t chunk_numel = 0;    // q = c * e
  int64_t shard_offset = 0;   // of the chunk, in the shard buffer
  int64_t region_offset = 0;  // of the region, in the full buffer
  int64_t region_numel = 0;   // p * q
  [[nodiscard]] int64_t numel() const { return num_rows * row_numel; }
};

// Immutable after construction.
class ShardLayout {
 public:
  // `alignment` is in elements: 16 bytes over the size of the narrowest type that travels.
  // Throws InvalidArgument for partition_size < 1, alignment < 1 or a negative size.
  ShardLayout(const std::vector<ParameterShape>& shapes, int partition_size, int64_t alignment);

  [[nodiscard]] int partition_size() const { return partition_size_; }
  [[nodiscard]] int num_parameters() const { return static_cast<int>(parameters_.size()); }
  [[nodiscard]] const ParameterLayout& parameter(int index) const;

  // S: length of the shard buffer, alignment gaps included. One slot of a node block.
  [[nodiscard]] int64_t shard_numel() const { return shard_numel_; }
  // Q: sum of all chunk_numel: S without the alignment gaps. What hop 2 moves per slot.
  [[nodiscard]] int64_t payload_numel() const { return payload_numel_; }
  // Length of the full buffer, padding and gaps included.
  [[nodiscard]] int64_t full_numel() const { return full_numel_; }
  // Sum of the parameters' own sizes, without any padding.
  [[nodiscard]] int64_t parameter_numel() const { return parameter_numel_; }

  // Rows [first, last) of parameter `index` that `partition_rank` owns; first == last when none.
  struct RowRange {
    int64_t first = 0;
    int64_t last = 0;
  };
  [[nodiscard]] RowRange rows_of(int index, int partition_rank) const;

 private:
  // Constant after construction.
  int partition_size_;
  std::vector<ParameterLayout> parameters_;
  int64_t shard_numel_ = 0;
  int64_t payload_numel_ = 0;
  int64_t full_numel_ = 0;
  int64_t parameter_numel_ = 0;
};

}  // namespace mics
