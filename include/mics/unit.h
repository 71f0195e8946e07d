// Unit: parameters that are gathered, reduced and freed together, and the state of their gradients.
//
// A unit has these tensors:
//   shard     [S], optimizer's dtype         this rank's chunks; sharded parameters are views
//   full      [full_numel], parameter dtype  while unsharded; full parameters are views
//   pending   [Sg], accumulation dtype       gradient shard, summed over the partition group and
//                                            over micro-steps, not yet over the replication group
//   hidden    [Sg], accumulation dtype       synchronised in a backward that has not ended
//   gradient  [Sg], the shard's dtype        synchronised; `.grad` of sharded parameters are views
// Sg is the shard length of the trainable parameters alone. Pending and hidden take the memory of
// gradient where no `.grad` uses it and the dtypes agree, so that nothing is copied.
//
// A Unit holds state and moves nothing: GatherPipeline fills `full`, ReducePipeline takes the full
// gradients and fills `pending` and `hidden`, expose() joins `hidden` to `.grad`.
//
// A part that was synchronised is never reduced again: what comes later is added apart and joined
// at its own boundary.
//
// Source: MiCS paper section 3.4; docs/design.md.
//
// Thread safety: one thread at a time. Errors leave the shard untouched.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mics/communicator.h"
#include "mics/cost_model.h"
#include "mics/full_buffer.h"
#include "mics/shard_layout.h"
#include "mics/unit_collectives.h"

namespace mics {

// One parameter as the unit holds it.
struct UnitParameter {
  std::string name;            // fully qualified; for messages
  std::vector<int64_t> sizes;  // of the full parameter
  at::Tensor sharded;          // what the optimizer sees; its `.grad` is set by expose()
  // What `.grad` is set to: wraps this parameter's part of the gradient buffer. Undefined when
  // frozen.
  at::Tensor gradient;
  bool is_trainable = true;
  at::Tensor local = {};  // this rank's rows, a part of the shard; may be undefined
};

struct UnitOptions {
  std::string name;
  std::vector<UnitParameter> parameters;
  at::Tensor shard;     // [S]
  at::Tensor gradient;  // [Sg], of the shard's dtype; undefined when all are frozen
  at::ScalarType parameter_dtype = at::kFloat;  // of the full parameters; travels in gathers
  at::ScalarType reduce_dtype = at::kFloat;     // travels in reductions
  int partition_size = 1;
  bool is_outer = false;  // other units run inside its forward
};

// Where a unit's collectives run. All outlive the unit.
struct UnitCommunicators {
  HopCommunicators gather;
  HopCommunicators reduce;
  Communicator* replicate = nullptr;  // null when there is one replica
};

// How a unit behaves; each may be changed between steps.
struct UnitSettings {
  // What stays until backward needs the unit, and until the next forward does. What is kept is
  // gathered anew when the shard was written.
  ResidencySettings residency;
  bool unshard_in_backward = true;
  bool reduce_gradients = true;  // false: keep full gradients, reduce nothing (accumulate="local")
  bool synchronize_gradients = true;  // false: hop 1 only; the accumulation goes on
  double gradient_factor = 1.0;       // multiplies the sum over all ranks, once, in fp32
};

class Unit {
 public:
  // Throws InvalidArgument when a tensor does not fit the layout.
  Unit(UnitOptions options, UnitCommunicators communicators);

  [[nodiscard]] const std::string& name() const { return options_.name; }
  void rename(std::string name) { options_.name = std::move(name); }
  [[nodiscard]] at::Device device() const { return options_.shard.device(); }
  [[nodiscard]] const at::Tensor& shard() const { return options_.shard; }
  [[nodiscard]] at::ScalarType parameter_dtype() const { return options_.parameter_dtype; }
  [[nodiscard]] at::ScalarType reduce_dtype() const { return options_.reduce_dtype; }
  [[nodiscard]] const ShardLayout& layout() const { return layout_; }
  [[nodiscard]] const ShardLayout& gradient_layout() const { return gradient_layout_; }
  [[nodiscard]] const UnitCommunicators& communicators() const { return communicators_; }
  [[nodiscard]] int num_nodes() const { return communicators_.gather.num_nodes(); }
  [[nodiscard]] int num_trainable() const { return static_cast<int>(trainable_.size()); }
  [[nodiscard]] UnitSettings& settings() { return settings_; }
  [[nodiscard]] const UnitSettings& settings() const { return settings_; }

  // --- what it needs of RuntimeMemory ---
  // The full parameters are the shard itself: one rank, one dtype. Nothing is gathered then.
  [[nodiscard]] bool full_is_shard() const { return full_is_shard_; }
  // Hop 2 reads a block and not the shard: several nodes, or the dtype changes.
  [[nodiscard]] bool has_block() const;
  [[nodiscard]] int64_t full_nbytes() const { return full_is_shard_ ? 0 : full_.nbytes(); }
  [[nodiscard]] int64_t block_nbytes() const;
  // Has memory of its own for its full parameters: it rests unsharded, or is in use while others
  // are.
  [[nodiscard]] bool keeps_full() const;
  // Has memory of its own for its node block.
  [[nodiscard]] bool keeps_block() const;
  // Hop 2 of reduce runs at the boundary only.
  [[nodiscard]] bool accumulates_block() const;
  // Elements of gradients that cannot be reduced where autograd leaves them.
  [[nodiscard]] int64_t packed_gradient_numel() const;

  // --- full parameters ---
  [[nodiscard]] bool is_unsharded() const { return full_.is_attached(); }
  // Views of the full buffer, one per parameter, for set_full_parameters().
  [[nodiscard]] std::vector<at::Tensor> full_views() const;
  // The leaf tensors over full_views() that autograd sees; their `.grad` is taken by
  // take_full_gradients().
  void set_full_parameters(std::vector<at::Tensor> full_parameters);
  // Called with true when the module must hold the full parameters and with false when it must hold
  // the sharded ones.
  void set_exchange(std::function<void(bool)> exchange) { exchange_ = std::move(exchange); }
  // Version counters of the shard, its parts and the sharded parameters: most writes move it, but
  // not all.
  [[nodiscard]] int64_t shard_version() const;
  // Lets the full parameters lie in `memory` [full_nbytes], which must outlive detach().
  void attach(const at::Tensor& memory) { full_.attach(memory); }
  void detach() { full_.detach(); }
  // The values are now those of `version`. When they were another's, a graph recorded over those
  // must not run backward silently: the full parameters' version counters move.
  void note_gathered(int64_t version);
  // Puts the full or the sharded parameters into the module.
  void exchange(bool full);

  // --- gradients on their way ---
  // Called with the synchronised gradient [Sg] before it becomes visible; may change it in place.
  void set_gradient_hook(std::function<void(const at::Tensor&)> hook) { hook_ = std::move(hook); }
  // Leaves the full gradients of this backward for a reduction at a later boundary.
  void defer_reduce() { is_deferred_ = true; }
  [[nodiscard]] bool is_deferred() const { return is_deferred_; }
  // Moves the full gradients out, one per trainable parameter, each as [region_numel] in the reduce
  // dtype: autograd's own tensor where that fits, else its copy in memory from `pack(numel)`, which
  // is asked at most once. Parameters without a gradient on this rank give zeros.
  [[nodiscard]] std::vector<at::Tensor> take_full_gradients(
      const std::function<at::Tensor(int64_t)>& pack);
  // A full gradient waits for a reduction.
  [[nodiscard]] bool has_full_gradient() const;

  // Undefined: nothing pending.
  [[nodiscard]] const at::Tensor& pending() const { return pending_; }
  // Makes pending() and gives it, uninitialised but for the layout's alignment gaps.
  [[nodiscard]] const at::Tensor& new_pending();
  // The gradient block holds a sum over micro-steps.
  [[nodiscard]] bool has_pending_block() const { return has_pending_block_; }
  void set_pending_block(bool has_block) { has_pending_block_ = has_block; }
  [[nodiscard]] bool has_pending() const { return pending_.defined() || has_pending_block_; }
  // Undefined: nothing was synchronised since the last expose().
  [[nodiscard]] const at::Tensor& hidden() const { return hidden_; }
  // pending() becomes hidden(), which must be undefined.
  void hide_pending();
  // pending() has been added to hidden().
  void drop_pending() { pending_.reset(); }

  // Adds hidden() to `.grad` of each trainable parameter i with `is_used[i]`, or sets it. The
  // others had no gradient on any rank and keep what they have.
  void expose(const std::vector<bool>& is_used);
  // 1 for each trainable parameter that had a gradient on this rank since the last expose().
  [[nodiscard]] const std::vector<bool>& used() const { return used_; }

  // False when a parameter was frozen or unfrozen since change_trainable() or construction.
  [[nodiscard]] bool matches_requires_grad() const;
  // Lets full parameters require gradients as the sharded ones do now, with gradients for those
  // parameters i whose `gradients[i]` is defined: `.grad` to be, views of `gradient` [Sg]. What was
  // accumulated stays, so no parameter that has a part of it may be left out. Graphs that are alive
  // stay so. Only while no gradient block holds a sum, and nothing is under way.
  void change_trainable(const std::vector<at::Tensor>& gradients, at::Tensor gradient);
  // A gradient has been reduced, or waits to be, that is not visible. The same on every rank.
  [[nodiscard]] bool is_accumulating() const {
    return has_pending() || is_deferred() || hidden().defined();
  }
  // Calls torch's post-accumulate-grad hooks of the parameters that expose() has just given a
  // gradient, in the order of parameters. Throws what they throw.
  void run_gradient_hooks(const std::vector<bool>& is_used) const;
  // A sharded parameter may have hooks on its gradient (Tensor.register_hook).
  [[nodiscard]] bool may_have_hooks() const;
  // Full parameters that no forward of the unit's own modules uses are kept for the whole forward
  // of the outermost unit.
  void set_lent() { is_lent_ = true; }
  [[nodiscard]] bool is_lent() const { return is_lent_; }
  // Calls `arrived` when a full parameter gets a gradient. Once.
  void watch_gradients(const std::function<void()>& arrived);
  // Drops gradients that have not become visible. Keeps `.grad`.
  void drop_gradients();

 private:
  [[nodiscard]] bool fits_region(const at::Tensor& gradient, int64_t region_numel) const;
  [[nodiscard]] bool has_visible_gradient() const;
  [[nodiscard]] at::Tensor free_accumulation_buffer();
  void find_trainable();

  // Constant after construction.
  UnitOptions options_;
  const UnitCommunicators communicators_;
  const ShardLayout layout_;
  const bool full_is_shard_;
  std::vector<at::Tensor> full_parameters_;
  std::function<void(bool)> exchange_;
  std::function<void(const at::Tensor&)> hook_;

  // Of the parameters that have a gradient; see change_trainable().
  std::vector<int> trainable_;  // their indices
  ShardLayout gradient_layout_;

  UnitSettings settings_;
  FullBuffer full_;
  bool module_holds_full_ = false;
  bool is_lent_ = false;
  bool watches_gradients_ = false;
  std::optional<int64_t> gathered_version_;

  at::Tensor separate_;  // memory for pending or hidden beside the gradient; made when first needed
  at::Tensor pending_;   // options_.gradient, separate_ or a tensor of its own; undefined: nothing
  at::Tensor hidden_;    // likewise, never the same as pending_
  bool has_pending_block_ = false;
  // The same on every rank, unlike whether there is a full gradient.
  bool is_deferred_ = false;
  std::vector<bool> used_;
};

// Elements to which chunks and regions are aligned: 16 bytes of the narrowest type that travels.
[[nodiscard]] int64_t layout_alignment(at::ScalarType parameter_dtype, at::ScalarType reduce_dtype);

// The communicators of the units' hops, each once, in an order that is the same on all ranks.
[[nodiscard]] std::vector<Communicator*> hop_communicators(
    const std::vector<std::shared_ptr<Unit>>& units);

}  // namespace mics
