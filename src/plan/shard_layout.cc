#include "mics/shard_layout.h"

#include <algorithm>

#include "plan/check.h"

namespace mics {

namespace {

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace

ShardLayout::ShardLayout(const std::vector<ParameterShape>& shapes, int partition_size,
                         int64_t alignment)
    : partition_size_(partition_size) {
  MICS_CHECK(partition_size >= 1,
             "partition_size must be at least 1: got partition_size=", partition_size, ".");
  MICS_CHECK(alignment >= 1, "alignment must be at least 1 element: got alignment=", alignment,
             ".");
  for (size_t i = 0; i < shapes.size(); ++i) {
    const std::vector<int64_t>& sizes = shapes[i].sizes;
    ParameterLayout parameter;
    parameter.num_rows = sizes.empty() ? 1 : sizes.front();
    parameter.row_numel = 1;
    for (size_t dim = 1; dim < sizes.size(); ++dim) parameter.row_numel *= sizes[dim];
    MICS_CHECK(std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size >= 0; }),
               "parameter sizes must not be negative: got a negative size in parameter ", i, ".");
    parameter.chunk_rows = (parameter.num_rows + partition_size - 1) / partition_size;
    parameter.chunk_numel = parameter.chunk_rows * parameter.row_numel;
    parameter.region_numel = parameter.chunk_numel * partition_size;
    parameter.shard_offset = shard_numel_;
    parameter.region_offset = full_numel_;
    shard_numel_ += round_up(parameter.chunk_numel, alignment);
    full_numel_ += round_up(parameter.region_numel, alignment);
    payload_numel_ += parameter.chunk_numel;
    parameter_numel_ += parameter.numel();
    parameters_.push_back(parameter);
  }
}

const ParameterLayout& ShardLayout::parameter(int index) const {
  MICS_CHECK(index >= 0 && index < num_parameters(),
             "a parameter index must be in [0, num_parameters): got index=", index,
             ", num_parameters=", num_parameters(), ".");
  return parameters_[static_cast<size_t>(index)];
}

ShardLayout::RowRange ShardLayout::rows_of(int index, int partition_rank) const {
  const ParameterLayout& p = parameter(index);
  const int64_t first = std::min(p.chunk_rows * partition_rank, p.num_rows);
  return {first, std::min(first + p.chunk_rows, p.num_rows)};
}

}  // namespace mics
