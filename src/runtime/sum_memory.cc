#include "runtime/sum_memory.h"

#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>

namespace mics {

int64_t SumMemory::plan() {
  if (!is_planned()) return 0;
  const c10::NoGradGuard no_grad;
  if (!separate_.defined()) {
    separate_ = at::zeros_like(gradient_, gradient_.options().dtype(dtype_));
  }
  return static_cast<int64_t>(separate_.nbytes());
}

int64_t SumMemory::unplanned_nbytes() const {
  if (!separate_.defined() || is_planned()) return 0;
  return static_cast<int64_t>(separate_.nbytes());
}

at::Tensor SumMemory::take(const at::Tensor& synchronized, bool is_visible) {
  if (gradient_.scalar_type() == dtype_ && !synchronized.is_same(gradient_) && !is_visible) {
    return gradient_;
  }
  if (separate_.defined() && synchronized.is_same(separate_)) return at::zeros_like(separate_);
  if (!separate_.defined()) {
    separate_ = at::zeros_like(gradient_, gradient_.options().dtype(dtype_));
  }
  return separate_;
}

}  // namespace mics
