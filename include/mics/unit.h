// Unit: parameters that are gathered, reduced and freed together, and the state of their gradients.
//
// A unit has four kinds of tensors:
//   shard     [S], optimizer's dtype         this rank's chunks; sharded parameters are views
//   full      [full_numel], parameter dtype  while unsharded; full parameters are views
//   pending   [Sg], accumulation dtype       gradient shard, summed over the partition group and
//                                            over micro-steps, not yet over the replication group
//   hidden    [Sg], accumulation dtype       synchronised in a backward that has not ended
//   gradient  [Sg], the shard's dtype        synchronised; `.grad` of sharded parameters are views
// Sg is the shard length of the trainable parameters alone. Pending and hidden take the memory of
// gradient where no `.grad` uses it and the dtypes agree, so that nothing is copied.
//
//   reduce() every micro-step      full gradients -> hop 1 -> added to pending
//   synchronize() at the boundary  pending -> hop 2 over replicas -> times factor -> hidden
//   expose() when backward ends    hidden -> joined to `.grad`
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
};

struct UnitOptions {
  std::string name;
  std::vector<UnitParameter> parameters;
  at::Tensor shard;     // [S]
  at::Tensor gradient;  // [Sg], of the shard's dtype; undefined when all are frozen
  at::ScalarType parameter_dtype = at::kFloat;  // of the full parameters; travels in gathers
  at::ScalarType reduce_dtype = at::kFloat;     // travels in reductions
  int partition_size = 1;
};

// Where a unit's collectives run. All outlive the unit.
struct UnitCommunicators {
  HopCommunicators gather;
  HopCommunicators reduce;
  Communicator* replicate = nullptr;  // null when there is one replica
};

// Scratch memory that units take turns to use: grown when needed, never shrunk.
class Scratch {
 public:
  // An uninitialised tensor [numel], valid until the next take() of the same `purpose`.
  enum class Purpose { kBlock, kRegions };
  [[nodiscard]] at::Tensor take(Purpose purpose, int64_t numel, at::ScalarType dtype,
                                at::Device device);

 private:
  at::Tensor block_;
  at::Tensor regions_;
};

// How a unit behaves; each may be changed between steps.
struct UnitSettings {
  bool reshard_after_forward = true;
  bool reshard_after_backward = true;
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
  [[nodiscard]] at::Device device() const { return options_.shard.device(); }
  [[nodiscard]] const ShardLayout& layout() const { return layout_; }
  [[nodiscard]] const ShardLayout& gradient_layout() const { return gradient_layout_; }
  [[nodiscard]] int num_trainable() const { return static_cast<int>(trainable_.size()); }
  [[nodiscard]] bool is_unsharded() const { return full_.is_attached(); }
  [[nodiscard]] UnitSettings& settings() { return settings_; }

  // Views of the full buffer, one per parameter, for set_full_parameters().
  [[nodiscard]] std::vector<at::Tensor> full_views() const;
  // The leaf tensors over full_views() that autograd sees; their `.grad` is taken by reduce().
  void set_full_parameters(std::vector<at::Tensor> full_parameters);
  // Called with true when the module must hold the full parameters and with false when it must hold
  // the sharded ones.
  void set_exchange(std::function<void(bool)> exchange) { exchange_ = std::move(exchange); }
  // Called with the synchronised gradient [Sg] before it becomes visible; may change it in place.
  void set_gradient_hook(std::function<void(const at::Tensor&)> hook) { hook_ = std::move(hook); }

  // Gathers the full parameters unless they are there and current, and puts them into the module.
  // A full buffer is stale when the shard was written since, through any of its tensors.
  void unshard(Scratch& scratch, Stream& stream);
  // Puts the sharded parameters into the module and, if `release`, frees the full buffer.
  void reshard(bool release);

  // Leaves the full gradients of this backward for a reduce() at a later boundary.
  void defer_reduce() { is_deferred_ = true; }
  [[nodiscard]] bool is_deferred() const { return is_deferred_; }
  // Takes the full parameters' gradients, reduces them inside the partition group and adds them to
  // pending. Parameters without a gradient on this rank count as zeros.
  void reduce(Scratch& scratch, Stream& stream);
  // Sums pending over the replication group and scales it. `.grad` is not touched: a backward that
  // fails later leaves it as it was.
  void synchronize(Stream& stream);
  // Adds what synchronize() gave to `.grad` of each trainable parameter i with `is_used[i]`, or
  // sets it. The others had no gradient on any rank and keep what they have.
  void expose(const std::vector<bool>& is_used);

  // 1 for each trainable parameter that had a gradient on this rank since the last expose().
  [[nodiscard]] const std::vector<bool>& used() const { return used_; }
  // reduce() has run since the last synchronize().
  [[nodiscard]] bool has_pending() const { return pending_.defined(); }
  // synchronize() has run since the last expose().
  [[nodiscard]] bool has_hidden_gradient() const { return hidden_.defined(); }
  // A full gradient waits for a reduce().
  [[nodiscard]] bool has_full_gradient() const;

  // False when a parameter was frozen or unfrozen since construction.
  [[nodiscard]] bool matches_requires_grad() const;

  // Drops gradients that have not become visible. Keeps `.grad`.
  void drop_gradients();
  // Drops everything in flight: drop_gradients() and the full parameters. Keeps shard and `.grad`.
  void reset();

 private:
  // Moves with every write to the shard: version counters of the shard (shared with its views) and
  // of the sharded parameters (an optimizer that works on a DTensor counts there only).
  [[nodiscard]] int64_t shard_version() const;
  [[nodiscard]] at::Tensor gradient_region(int trainable_index, at::Tensor& packed) const;
  [[nodiscard]] bool has_visible_gradient() const;
  [[nodiscard]] at::Tensor free_accumulation_buffer();

  // Constant after construction.
  UnitOptions options_;
  const UnitCommunicators communicators_;
  const ShardLayout layout_;
  std::vector<int> trainable_;  // indices of trainable parameters
  const ShardLayout gradient_layout_;
  std::vector<at::Tensor> full_parameters_;
  std::function<void(bool)> exchange_;
  std::function<void(const at::Tensor&)> hook_;

  UnitSettings settings_;
  FullBuffer full_;
  bool module_holds_full_ = false;
  std::optional<int64_t> gathered_version_;  // shard_version() at the last gather

  at::Tensor separate_;  // memory for pending or hidden beside the gradient; made when first needed
  at::Tensor pending_;   // options_.gradient, separate_ or a tensor of its own; undefined: nothing
  at::Tensor hidden_;    // likewise, never the same as pending_
  // The same on every rank, unlike whether there is a full gradient.
  bool is_deferred_ = false;
  std::vector<bool> used_;
};

// Elements to which chunks and regions are aligned: 16 bytes of the narrowest type that travels.
[[nodiscard]] int64_t layout_alignment(at::ScalarType parameter_dtype, at::ScalarType reduce_dtype);

}  // namespace mics
