// AdamW and SGD over flat tensors: the arithmetic of torch.optim, once per run instead of once per
// parameter.
//
// A run is what neighbouring parameters of a unit share: one stretch of the shard, of the gradient
// and of each state, all of one length, dtype and device. Alignment gaps inside a run are stepped
// with the rest; nothing reads them.
//
// Each element goes through the operations of torch's single-tensor form, in its order, so values
// are equal bit for bit. On a CPU they go through them block by block: a block stays in the cache
// from the first operation to the last, and scratch memory is one block.
//
// Source: AdamW, arXiv:1711.05101; amsgrad, arXiv:1904.09237; torch.optim for the order of
// operations. Fused AdamW is at::_fused_adamw_ over the runs.
//
// Thread safety: calls on different tensors may run at the same time. Errors leave earlier runs
// stepped.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mics {

struct AdamWRun {
  at::Tensor parameter;       // changed
  at::Tensor gradient;        // read
  at::Tensor exp_avg;         // changed
  at::Tensor exp_avg_sq;      // changed
  at::Tensor max_exp_avg_sq;  // changed; undefined without amsgrad
};

struct AdamWOptions {
  double lr = 0.0;
  double beta1 = 0.0;
  double beta2 = 0.0;
  double eps = 0.0;
  double weight_decay = 0.0;
  bool maximize = false;
  // torch's fused kernel, one launch for all runs of a device and dtype: each state is read and
  // written once. Values differ from the others' in the last bits.
  bool fused = false;
};

// `steps[i]` is the number of this step of `runs[i]`, from 1. Throws InvalidArgument when the
// lengths of a run's tensors differ.
void adamw_step(const std::vector<AdamWRun>& runs, const std::vector<double>& steps,
                const AdamWOptions& options);

struct SgdRun {
  at::Tensor parameter;        // changed
  at::Tensor gradient;         // read
  at::Tensor momentum_buffer;  // changed; undefined without momentum
};

struct SgdOptions {
  double lr = 0.0;
  double momentum = 0.0;
  double dampening = 0.0;
  double weight_decay = 0.0;
  bool nesterov = false;
  bool maximize = false;
};

// `is_first[i]`: the momentum buffer of `runs[i]` has no value yet and becomes the gradient,
// without dampening. Throws InvalidArgument when the lengths of a run's tensors differ.
void sgd_step(const std::vector<SgdRun>& runs, const std::vector<bool>& is_first,
              const SgdOptions& options);

}  // namespace mics
