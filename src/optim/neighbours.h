// Finds tensors that lie next to each other in memory, so that one operation can take them
// together.
//
// Thread safety: any.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mics {

// Flat views that hold each element of `tensors` once and nothing else. Contiguous tensors of one
// storage and dtype without a gap between them come as one view; others come alone, flattened when
// they are contiguous and as they are when not. Empty tensors are left out.
//
// Ordered by storage, as their first tensors are in `tensors`, then by place in the storage. Never
// by address, so all ranks get the same order.
[[nodiscard]] std::vector<at::Tensor> join_neighbours(const std::vector<at::Tensor>& tensors);

}  // namespace mics
