// UnitGradients: the gradients of one unit on their way from autograd to `.grad`.
//
//   full gradients  `.grad` of the full parameters          left by autograd
//   accumulated     [Sg], accumulation dtype                summed over the partition group and over
//                                                           micro-steps, not yet over replicas
//   synchronized    [Sg], accumulation dtype                summed over all ranks, not yet visible
//   gradient        [Sg], the shard's dtype                 `.grad` of sharded parameters are views
//
// Sg is the shard length of the trainable parameters alone. Accumulated and synchronized use the
// memory of gradient where no `.grad` uses it and the dtypes agree: then nothing is copied.
//
// It moves nothing between ranks: ReducePipeline takes the full gradients and fills the sums.
//
// State          accumulated  synchronized  next
// kNone          no           no            kAccumulated by a reduction
// kAccumulated   yes          no            kSynchronized by note_synchronized()
// kSynchronized  no           yes           kBoth by a later reduction, kNone by publish()
// kBoth          yes          yes           kSynchronized by note_synchronized()
//
// drop() goes to kNone from any state; any other transition is an InternalError. A part that was
// synchronized is never reduced again: later gradients are summed apart and added to it.
//
// Thread safety: one thread at a time. Source: MiCS paper section 3.4; docs/design.md 9, 10, 11.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "mics/shard_layout.h"
#include "mics/unit_parameters.h"

namespace mics {

enum class GradientState { kNone, kAccumulated, kSynchronized, kBoth };

[[nodiscard]] constexpr bool has_accumulated(GradientState state) {
  return state == GradientState::kAccumulated || state == GradientState::kBoth;
}

class SumMemory;

class UnitGradients {
 public:
  // `parameters` outlives it. Throws InvalidArgument when the gradient does not have the layout's
  // length.
  UnitGradients(const UnitOptions& options, UnitParameters& parameters);

  [[nodiscard]] const ShardLayout& layout() const { return layout_; }
  [[nodiscard]] at::ScalarType reduce_dtype() const { return reduce_dtype_; }

  // --- full gradients ---
  [[nodiscard]] bool has_full() const;
  // Leaves the full gradients of this backward for a reduction at a later boundary.
  void defer() { is_deferred_ = true; }
  [[nodiscard]] bool is_deferred() const { return is_deferred_; }
  // Moves the full gradients out, one per trainable parameter, each as [region_numel] in the reduce
  // dtype: autograd's own tensor where that fits, else its copy in memory from `pack(numel)`, which
  // is called at most once. Parameters without a gradient on this rank give zeros. Makes next_sum(),
  // so that its fill is ordered as the gradients are.
  [[nodiscard]] std::vector<at::Tensor> take_full(const std::function<at::Tensor(int64_t)>& pack);
  // For a partition group of one: adds the full gradients to accumulated(), on compute, and frees
  // them. Those that are missing on this rank count as zeros.
  void sum_full();
  // Calls `arrived` when a full parameter gets a gradient. Only the first call counts.
  void watch(const std::function<void()>& arrived);

  // --- sums ---
  [[nodiscard]] GradientState state() const { return state_; }
  // A gradient was reduced, or waits to be, that is not visible. The same on every rank.
  [[nodiscard]] bool is_accumulating() const {
    return state_ != GradientState::kNone || is_deferred_;
  }
  // Undefined: none, or all of it is in the gradient block.
  [[nodiscard]] const at::Tensor& accumulated() const { return accumulated_; }
  // The memory of accumulated(), there or to be. Its alignment gaps are zeros.
  [[nodiscard]] const at::Tensor& next_sum() const { return next_sum_; }
  // Where sums lie.
  [[nodiscard]] SumMemory& sum_memory() const { return *sums_; }
  // Makes accumulated() of next_sum(); its values are undefined.
  [[nodiscard]] const at::Tensor& new_accumulated();
  // The gradient block of RuntimeMemory holds a sum over micro-steps, over one node's ranks.
  [[nodiscard]] bool has_block() const { return has_block_; }
  void set_has_block(bool has_block);
  // Undefined: none.
  [[nodiscard]] const at::Tensor& synchronized() const { return synchronized_; }
  // accumulated() has been summed over all ranks: it becomes synchronized(), or has been added to
  // it where there was one.
  void note_synchronized();

  // --- visible gradients ---
  // Called with the synchronized gradient [Sg] before it becomes visible; may change it in place.
  void set_hook(std::function<void(const at::Tensor&)> hook) { hook_ = std::move(hook); }
  // 1 for each trainable parameter that had a gradient on this rank since the last publish().
  [[nodiscard]] const std::vector<bool>& used() const { return used_; }
  // Adds synchronized() to `.grad` of each trainable parameter i with `is_used[i]`, or sets it. The
  // others had no gradient on any rank and keep what they have. Nothing without synchronized().
  void publish(const std::vector<bool>& is_used);
  // Calls torch's post-accumulate-grad hooks of the parameters that publish() has just given a
  // gradient, in the order of parameters. Throws what they throw.
  void run_hooks(const std::vector<bool>& is_used) const;
  // Drops everything that is not visible. Keeps `.grad`.
  void drop();

  // Lets full parameters require gradients as the sharded ones do now. `gradients[i]`: what `.grad`
  // of parameter i will be, a view of `gradient` [Sg]; undefined when frozen. What was accumulated
  // stays, so a parameter that has a part of it may not be frozen. Graphs that are alive stay so.
  // Only while has_block() is false and nothing is in flight.
  void change_trainable(const std::vector<at::Tensor>& gradients, at::Tensor gradient);

 private:
  void change_state(GradientState next);
  // A reduction has been added to accumulated() or to the gradient block.
  void note_sum();
  // Derives trainable_, layout_ and used_ from gradients_.
  void lay_out();
  [[nodiscard]] int num_trainable() const { return static_cast<int>(trainable_.size()); }
  void check_dense(const at::Tensor& gradient, int index) const;
  // Elements of the regions that do not fit autograd's own gradients.
  [[nodiscard]] int64_t count_unfit() const;
  [[nodiscard]] int trainable(int index) const { return trainable_[static_cast<size_t>(index)]; }
  [[nodiscard]] const at::Tensor& sharded(int index) const {
    return parameters_.parameter(trainable(index)).sharded;
  }
  [[nodiscard]] const at::Tensor& full(int index) const {
    return parameters_.full(trainable(index));
  }
  [[nodiscard]] bool fits_region(const at::Tensor& gradient, int64_t region_numel) const;
  [[nodiscard]] bool has_visible() const;
  // Memory that neither a visible gradient nor synchronized_ uses.
  [[nodiscard]] at::Tensor free_buffer();

  UnitParameters& parameters_;
  const at::ScalarType reduce_dtype_;
  std::function<void(const at::Tensor&)> hook_;

  // Of the trainable parameters; see change_trainable().
  std::vector<at::Tensor> gradients_;  // per parameter; undefined when frozen
  at::Tensor gradient_;                // [Sg]
  std::vector<int> trainable_;         // indices of those that are not frozen
  ShardLayout layout_;

  GradientState state_ = GradientState::kNone;
  std::shared_ptr<SumMemory> sums_;
  at::Tensor next_sum_;      // of sums_
  at::Tensor accumulated_;   // next_sum_, or undefined
  at::Tensor synchronized_;  // likewise, never the same as accumulated_
  bool has_block_ = false;
  bool is_deferred_ = false;  // the same on every rank, unlike has_full()
  bool is_watched_ = false;
  std::vector<bool> used_;
};

}  // namespace mics
