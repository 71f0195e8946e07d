// UnitParameters: the shard and the full parameters of one unit, and which its modules hold.
//
//   shard  [S], optimizer's dtype         this rank's chunks; the sharded parameters are views
//   full   [full_numel], parameter dtype  there while unsharded; the full parameters are views
//
// It moves nothing: GatherPipeline fills the memory that it attaches.
//
// State        full parameters   modules hold   next
// kSharded     no memory         sharded        kAttached by attach()
// kAttached    readable          sharded        kRegistered by register_parameters(kFull),
//                                               kSharded by detach()
// kRegistered  readable          full           kAttached by register_parameters(kSharded)
//
// Any other transition is an InternalError. Source: MiCS paper section 3.4; docs/design.md 5.
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

#include "mics/shard_layout.h"

namespace mics {

class FullBuffer;

// One parameter of a unit.
struct UnitParameter {
  std::string name;            // fully qualified; for messages
  std::vector<int64_t> sizes;  // of the full parameter
  at::Tensor sharded;          // what the optimizer sees
  // What `.grad` of `sharded` is set to: this parameter's part of UnitOptions::gradient. Undefined
  // when the parameter is frozen. At construction; see UnitGradients::change_trainable().
  at::Tensor gradient;
  at::Tensor local = {};  // this rank's rows, a part of the shard; may be undefined
};

struct UnitOptions {
  std::string name;
  std::vector<UnitParameter> parameters;
  at::Tensor shard;                             // [S]
  at::Tensor gradient;                          // [Sg], of the shard's dtype; see UnitGradients
  at::ScalarType parameter_dtype = at::kFloat;  // of the full parameters; travels in gathers
  at::ScalarType reduce_dtype = at::kFloat;     // travels in reductions
  int partition_size = 1;
  bool has_nested_units = false;  // other units run inside its forward
};

enum class ParameterState { kSharded, kAttached, kRegistered };
enum class ParameterKind { kSharded, kFull };

class UnitParameters {
 public:
  // Throws InvalidArgument when the shard does not have the layout's length.
  explicit UnitParameters(const UnitOptions& options);
  ~UnitParameters();
  UnitParameters(const UnitParameters&) = delete;
  UnitParameters& operator=(const UnitParameters&) = delete;

  [[nodiscard]] const std::string& unit_name() const { return unit_name_; }
  void rename_unit(std::string name) { unit_name_ = std::move(name); }
  [[nodiscard]] int size() const { return static_cast<int>(parameters_.size()); }
  [[nodiscard]] const UnitParameter& parameter(int index) const {
    return parameters_[static_cast<size_t>(index)];
  }
  [[nodiscard]] const at::Tensor& full(int index) const {
    return full_parameters_[static_cast<size_t>(index)];
  }
  [[nodiscard]] const at::Tensor& shard() const { return shard_; }
  [[nodiscard]] at::ScalarType dtype() const { return dtype_; }  // of the full parameters
  [[nodiscard]] const ShardLayout& layout() const { return layout_; }
  // The full parameters are the shard itself: one rank, one dtype. Nothing is gathered then.
  [[nodiscard]] bool full_is_shard() const { return full_is_shard_; }
  // Bytes that attach() needs; 0 where the full parameters are the shard.
  [[nodiscard]] int64_t full_nbytes() const;

  [[nodiscard]] ParameterState state() const { return state_; }
  [[nodiscard]] bool is_unsharded() const { return state_ != ParameterState::kSharded; }
  // Views of the full buffer, one per parameter, for set_full(). Readable while unsharded.
  [[nodiscard]] std::vector<at::Tensor> full_views() const;
  // The leaf tensors over full_views() that autograd sees.
  void set_full(std::vector<at::Tensor> full_parameters);
  // Lets the full parameters lie in `memory` [full_nbytes], which must stay until detach().
  void attach(const at::Tensor& memory);
  // Nothing when sharded. A later use of the full parameters raises.
  void detach();
  // Called when the modules must hold the parameters of a kind from here on. When it throws they hold
  // the sharded ones.
  void set_registration(std::function<void(ParameterKind)> registration);
  // Puts the parameters of `kind` into the modules. Nothing when they are there.
  void register_parameters(ParameterKind kind);

  // Version counters of the shard, its parts and the sharded parameters. Most writes move one of
  // them, but not all.
  [[nodiscard]] int64_t shard_version() const;
  // The full parameters have the values of `version`. Where they had another version's, their own
  // version counters move: a graph recorded over old values must not run backward silently.
  void note_gathered(int64_t version);

  // False when a sharded parameter was frozen or unfrozen and its full parameter was not.
  [[nodiscard]] bool matches_requires_grad() const;
  // A sharded parameter may have hooks on its gradient (Tensor.register_hook).
  [[nodiscard]] bool may_have_gradient_hooks() const;

 private:
  void change_state(ParameterState next);

  // Constant after construction, but for the name.
  std::string unit_name_;
  const std::vector<UnitParameter> parameters_;
  const at::Tensor shard_;
  const at::ScalarType dtype_;
  const ShardLayout layout_;
  const bool full_is_shard_;
  std::vector<at::Tensor> full_parameters_;
  std::function<void(ParameterKind)> registration_;

  const std::unique_ptr<FullBuffer> full_buffer_;
  ParameterState state_ = ParameterState::kSharded;
  std::optional<int64_t> gathered_version_;
};

// Elements to which chunks and regions are aligned: 16 bytes of the narrowest type that travels.
[[nodiscard]] int64_t layout_alignment(at::ScalarType parameter_dtype, at::ScalarType reduce_dtype);

}  // namespace mics
