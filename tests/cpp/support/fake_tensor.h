// Memory that NCCL is called with, as a tensor.
#pragma once

#include <ATen/ops/from_blob.h>

#include "comm/nccl/nccl_api.h"

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

}  // namespace mics::testing
