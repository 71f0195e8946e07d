// Memory that NCCL is called with, as a tensor.
#pragma once

#include <ATen/ops/from_blob.h>

#include <vector>

#include "comm/nccl/nccl_api.h"
#include "mics/communicator.h"

namespace mics::testing {

inline at::ScalarType scalar_type_of(ncclDataType_t type) {
  switch (type) {
    case ncclFloat32:
      return at::kFloat;
    case ncclBfloat16:
      return at::kBFloat16;
    case ncclFloat16:
      return at::kHalf;
    case ncclFloat64:
      return at::kDouble;
    case ncclInt64:
      return at::kLong;
    default:
      return at::kByte;
  }
}

inline at::Tensor fake_tensor(void* data, int64_t numel, ncclDataType_t type) {
  return at::from_blob(data, {numel}, scalar_type_of(type));
}

// Sums `pieces` in their order, in fp32 or in their own dtype, as FakeNetwork::sums_in_fp32 says.
inline void fake_sum(const at::Tensor& sum, const std::vector<at::Tensor>& pieces, bool in_fp32) {
  if (in_fp32) return sum_in_order(sum, pieces);
  const at::Tensor total = pieces.front().clone();
  for (size_t i = 1; i < pieces.size(); ++i) total.add_(pieces[i]);
  sum.copy_(total);
}

}  // namespace mics::testing
