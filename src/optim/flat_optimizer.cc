#include "mics/flat_optimizer.h"

#include <ATen/Parallel.h>
#include <ATen/ScalarOps.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/maximum.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/sqrt.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>

#include "mics/error.h"
#include "plan/check.h"

namespace mics {

namespace {

// Elements per thread below which ATen runs on one thread only, so no block has fewer.
constexpr int64_t kBlockNumel = int64_t{1} << 15;

int64_t block_numel_of(const at::Tensor& tensor) {
  if (!tensor.device().is_cpu()) return std::max<int64_t>(tensor.numel(), 1);
  return kBlockNumel * at::get_num_threads();
}

// Elements [begin, end); an undefined tensor stays undefined.
at::Tensor part_of(const at::Tensor& tensor, int64_t begin, int64_t end) {
  if (!tensor.defined() || end - begin == tensor.numel()) return tensor;
  return tensor.narrow(0, begin, end - begin);
}

// Memory for one block of a run.
class BlockScratch {
 public:
  at::Tensor like(const at::Tensor& block) {
    const bool fits = memory_.defined() && memory_.scalar_type() == block.scalar_type() &&
                      memory_.device() == block.device() && memory_.numel() >= block.numel();
    if (!fits) memory_ = at::empty_like(block);
    return part_of(memory_, 0, block.numel());
  }

 private:
  at::Tensor memory_;
};

// Version counters must tell the same on every rank, so a run without elements is a write too.
void note_write(const at::Tensor& parameter) {
  if (parameter.numel() == 0) parameter.unsafeGetTensorImpl()->bump_version();
}

void check_lengths(const at::Tensor& parameter, std::initializer_list<at::Tensor> others) {
  for (const at::Tensor& other : others) {
    MICS_CHECK(!other.defined() || (other.dim() == 1 && other.numel() == parameter.numel()),
               "the tensors of a run must be flat and of one length: got numel=", parameter.numel(),
               " and ", other.numel(), ".");
  }
}

// Numbers wrapped as torch's Python methods wrap them: mul_(Scalar) would round the number to a
// 16-bit dtype, mul_(Tensor) does not. Made once for all runs, because wrapping costs more than a
// small operation.
struct AdamWNumbers {
  explicit AdamWNumbers(const AdamWOptions& options)
      : decay(at::native::wrapped_scalar_tensor(1.0 - options.lr * options.weight_decay)),
        beta2(at::native::wrapped_scalar_tensor(options.beta2)),
        eps(at::native::wrapped_scalar_tensor(options.eps)) {}

  // Sets the numbers that depend on the step.
  void set_step(double next, const AdamWOptions& options) {
    if (step == next) return;
    step = next;
    step_size = options.lr / (1.0 - std::pow(options.beta1, step));
    const double correction2 = 1.0 - std::pow(options.beta2, step);
    correction2_sqrt = at::native::wrapped_scalar_tensor(std::pow(correction2, 0.5));
  }

  const at::Tensor decay;
  const at::Tensor beta2;
  const at::Tensor eps;
  double step = 0.0;
  double step_size = 0.0;
  at::Tensor correction2_sqrt;
};

void step_block(const AdamWRun& run, const AdamWNumbers& numbers, const AdamWOptions& options,
                BlockScratch& gradient_scratch, BlockScratch& denominator_scratch) {
  const at::Tensor& parameter = run.parameter;
  at::Tensor gradient = run.gradient;
  if (options.maximize) {
    gradient = gradient_scratch.like(parameter);
    at::neg_out(gradient, run.gradient);
  }
  if (options.weight_decay != 0.0) parameter.mul_(numbers.decay);
  run.exp_avg.lerp_(gradient, 1.0 - options.beta1);
  run.exp_avg_sq.mul_(numbers.beta2).addcmul_(gradient, gradient, 1.0 - options.beta2);

  const at::Tensor* second_moment = &run.exp_avg_sq;
  if (run.max_exp_avg_sq.defined()) {
    at::Tensor maximum = run.max_exp_avg_sq;
    at::maximum_out(maximum, run.max_exp_avg_sq, run.exp_avg_sq);
    second_moment = &run.max_exp_avg_sq;
  }
  at::Tensor denominator = denominator_scratch.like(parameter);
  at::sqrt_out(denominator, *second_moment);
  denominator.div_(numbers.correction2_sqrt).add_(numbers.eps);
  parameter.addcdiv_(run.exp_avg, denominator, -numbers.step_size);
}

void step_block(const SgdRun& run, bool is_first, const at::Tensor& momentum,
                const SgdOptions& options, BlockScratch& scratch) {
  const at::Tensor& parameter = run.parameter;
  at::Tensor changed = scratch.like(parameter);
  at::Tensor gradient = run.gradient;
  if (options.maximize) gradient = at::neg_out(changed, gradient);
  if (options.weight_decay != 0.0) {
    gradient = at::add_out(changed, gradient, parameter, options.weight_decay);
  }
  if (run.momentum_buffer.defined()) {
    if (is_first) {
      run.momentum_buffer.copy_(gradient);
    } else {
      run.momentum_buffer.mul_(momentum).add_(gradient, 1.0 - options.dampening);
    }
    gradient = options.nesterov
                   ? at::add_out(changed, gradient, run.momentum_buffer, options.momentum)
                   : run.momentum_buffer;
  }
  parameter.add_(gradient, -options.lr);
}

// Runs of one device and dtype, as the kernel takes them.
struct FusedLists {
  std::vector<at::Tensor> parameters;
  std::vector<at::Tensor> gradients;
  std::vector<at::Tensor> exp_avgs;
  std::vector<at::Tensor> exp_avg_sqs;
  std::vector<at::Tensor> max_exp_avg_sqs;
  std::vector<at::Tensor> steps;  // [], fp32, on the device: made once for runs of one age
  double last_step = 0.0;
};

void fused_step(const std::vector<AdamWRun>& runs, const std::vector<double>& steps,
                const AdamWOptions& options) {
  std::vector<FusedLists> lists;
  for (size_t i = 0; i < runs.size(); ++i) {
    const AdamWRun& run = runs[i];
    note_write(run.parameter);
    if (run.parameter.numel() == 0) continue;
    const auto fits = [&](const FusedLists& list) {
      const at::Tensor& first = list.parameters.front();
      return first.device() == run.parameter.device() && first.dtype() == run.parameter.dtype() &&
             list.max_exp_avg_sqs.empty() == !run.max_exp_avg_sq.defined();
    };
    auto list = std::find_if(lists.begin(), lists.end(), fits);
    if (list == lists.end()) list = lists.insert(lists.end(), FusedLists());
    const bool has_step = !list->steps.empty() && list->last_step == steps[i];
    list->last_step = steps[i];
    list->steps.push_back(has_step
                              ? list->steps.back()
                              : at::full({}, steps[i], run.parameter.options().dtype(at::kFloat)));
    list->parameters.push_back(run.parameter);
    list->gradients.push_back(run.gradient);
    list->exp_avgs.push_back(run.exp_avg);
    list->exp_avg_sqs.push_back(run.exp_avg_sq);
    if (run.max_exp_avg_sq.defined()) list->max_exp_avg_sqs.push_back(run.max_exp_avg_sq);
  }
  for (const FusedLists& list : lists) {
    at::_fused_adamw_(list.parameters, list.gradients, list.exp_avgs, list.exp_avg_sqs,
                      list.max_exp_avg_sqs, list.steps, options.lr, options.beta1, options.beta2,
                      options.weight_decay, options.eps, !list.max_exp_avg_sqs.empty(),
                      options.maximize);
  }
}

}  // namespace

void adamw_step(const std::vector<AdamWRun>& runs, const std::vector<double>& steps,
                const AdamWOptions& options) {
  MICS_INTERNAL_CHECK(steps.size() == runs.size(), "one step number per run.");
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  for (const AdamWRun& run : runs) {
    check_lengths(run.parameter,
                  {run.parameter, run.gradient, run.exp_avg, run.exp_avg_sq, run.max_exp_avg_sq});
  }
  if (options.fused) return fused_step(runs, steps, options);
  AdamWNumbers numbers(options);
  BlockScratch gradient_scratch;
  BlockScratch denominator_scratch;
  for (size_t i = 0; i < runs.size(); ++i) {
    const AdamWRun& run = runs[i];
    numbers.set_step(steps[i], options);
    note_write(run.parameter);
    const int64_t numel = run.parameter.numel();
    const int64_t block_numel = block_numel_of(run.parameter);
    for (int64_t begin = 0; begin < numel; begin += block_numel) {
      const int64_t end = std::min(begin + block_numel, numel);
      step_block({part_of(run.parameter, begin, end), part_of(run.gradient, begin, end),
                  part_of(run.exp_avg, begin, end), part_of(run.exp_avg_sq, begin, end),
                  part_of(run.max_exp_avg_sq, begin, end)},
                 numbers, options, gradient_scratch, denominator_scratch);
    }
  }
}

void sgd_step(const std::vector<SgdRun>& runs, const std::vector<bool>& is_first,
              const SgdOptions& options) {
  MICS_INTERNAL_CHECK(is_first.size() == runs.size(), "one flag per run.");
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  const at::Tensor momentum = at::native::wrapped_scalar_tensor(options.momentum);
  BlockScratch scratch;
  for (size_t i = 0; i < runs.size(); ++i) {
    const SgdRun& run = runs[i];
    check_lengths(run.parameter, {run.parameter, run.gradient, run.momentum_buffer});
    note_write(run.parameter);
    const int64_t numel = run.parameter.numel();
    const int64_t block_numel = block_numel_of(run.parameter);
    for (int64_t begin = 0; begin < numel; begin += block_numel) {
      const int64_t end = std::min(begin + block_numel, numel);
      step_block({part_of(run.parameter, begin, end), part_of(run.gradient, begin, end),
                  part_of(run.momentum_buffer, begin, end)},
                 is_first[i], momentum, options, scratch);
    }
  }
}

}  // namespace mics
