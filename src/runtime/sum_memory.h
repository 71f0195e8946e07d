// SumMemory: where the sums of one unit's gradients lie. Allocated and filled on compute; the edge
// that orders the gradients orders it too (runtime_memory.h).
//
//   in the gradient   where no `.grad` uses it and the dtypes agree: then nothing is copied
//   beside it         made when first needed and kept; planned where the dtypes never agree
//   on its own        gradients that come after the unit's reduction, beside visible ones: freed
//                     after use
//
// Thread safety: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace mics {

class SumMemory {
 public:
  // `gradient` [Sg]; may be undefined: nothing is trainable. `dtype`: of sums.
  SumMemory(at::Tensor gradient, at::ScalarType dtype)
      : gradient_(std::move(gradient)), dtype_(dtype) {}

  // Makes the memory beside the gradient if it is planned. Returns its bytes.
  int64_t plan();
  // Bytes beside the gradient that were not planned.
  [[nodiscard]] int64_t unplanned_nbytes() const;
  // Memory [Sg] for a sum, with zeros in its alignment gaps. `synchronized`: a sum whose memory is
  // in use; may be undefined. `is_visible`: some `.grad` uses the gradient.
  [[nodiscard]] at::Tensor take(const at::Tensor& synchronized, bool is_visible);

 private:
  [[nodiscard]] bool is_planned() const {
    return gradient_.defined() && gradient_.numel() > 0 && gradient_.scalar_type() != dtype_;
  }

  const at::Tensor gradient_;
  const at::ScalarType dtype_;
  at::Tensor separate_;
};

}  // namespace mics
