#include "mics/unit.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <utility>

#include "mics/check.h"
#include "mics/error.h"

namespace mics {

int64_t layout_alignment(at::ScalarType parameter_dtype, at::ScalarType reduce_dtype) {
  const size_t narrowest =
      std::min(c10::elementSize(parameter_dtype), c10::elementSize(reduce_dtype));
  return static_cast<int64_t>(16 / narrowest);
}

at::Tensor Scratch::take(Purpose purpose, int64_t numel, at::ScalarType dtype, at::Device device) {
  at::Tensor& memory = purpose == Purpose::kBlock ? block_ : regions_;
  const int64_t nbytes = numel * static_cast<int64_t>(c10::elementSize(dtype));
  if (!memory.defined() || memory.numel() < nbytes || memory.device() != device) {
    memory = at::empty({nbytes}, at::TensorOptions().dtype(at::kByte).device(device));
  }
  return memory.narrow(0, 0, nbytes).view(dtype);
}

namespace {

std::vector<ParameterShape> shapes_of(const std::vector<UnitParameter>& parameters,
                                      bool only_trainable) {
  std::vector<ParameterShape> shapes;
  for (const UnitParameter& parameter : parameters) {
    if (parameter.is_trainable || !only_trainable) shapes.push_back({parameter.sizes});
  }
  return shapes;
}

ShardLayout layout_of(const UnitOptions& options, bool only_trainable) {
  return ShardLayout(shapes_of(options.parameters, only_trainable), options.partition_size,
                     layout_alignment(options.parameter_dtype, options.reduce_dtype));
}

at::Tensor chunk_of(const at::Tensor& buffer, const ParameterLayout& parameter) {
  return buffer.narrow(0, parameter.shard_offset, parameter.chunk_numel);
}

}  // namespace

Unit::Unit(UnitOptions options, UnitCommunicators communicators)
    : options_(std::move(options)),
      communicators_(communicators),
      layout_(layout_of(options_, /*only_trainable=*/false)),
      gradient_layout_(layout_of(options_, /*only_trainable=*/true)),
      full_(layout_.full_numel(), options_.parameter_dtype, options_.shard.device(),
            options_.name) {
  for (int i = 0; i < layout_.num_parameters(); ++i) {
    if (options_.parameters[static_cast<size_t>(i)].is_trainable) trainable_.push_back(i);
  }
  used_.assign(trainable_.size(), false);
  MICS_CHECK(options_.shard.numel() == layout_.shard_numel(),
             "the shard must have the layout's length: got numel=", options_.shard.numel(),
             ", shard_numel=", layout_.shard_numel(), " (unit \"", name(), "\").");
  MICS_CHECK(trainable_.empty() || options_.gradient.numel() == gradient_layout_.shard_numel(),
             "the gradient must have the layout's length: got numel=", options_.gradient.numel(),
             ", shard_numel=", gradient_layout_.shard_numel(), " (unit \"", name(), "\").");
}

std::vector<at::Tensor> Unit::full_views() const {
  std::vector<at::Tensor> views;
  for (int i = 0; i < layout_.num_parameters(); ++i) {
    views.push_back(full_.view(layout_.parameter(i).region_offset,
                               options_.parameters[static_cast<size_t>(i)].sizes));
  }
  return views;
}

void Unit::set_full_parameters(std::vector<at::Tensor> full_parameters) {
  MICS_CHECK(full_parameters.size() == options_.parameters.size(),
             "a unit needs one full parameter per parameter: got ", full_parameters.size(), " for ",
             options_.parameters.size(), " (unit \"", name(), "\").");
  full_parameters_ = std::move(full_parameters);
}

int64_t Unit::shard_version() const {
  int64_t version = options_.shard._version();
  for (const UnitParameter& parameter : options_.parameters)
    version += parameter.sharded._version();
  return version;
}

bool Unit::matches_requires_grad() const {
  return std::all_of(options_.parameters.begin(), options_.parameters.end(),
                     [](const UnitParameter& parameter) {
                       return parameter.sharded.requires_grad() == parameter.is_trainable;
                     });
}

void Unit::unshard(Scratch& scratch, Stream& stream) {
  const int64_t version = shard_version();
  const bool is_current = full_.is_attached() && gathered_version_ == version;
  if (!is_current) {
    // Buffers made here outlive an inference mode of the caller.
    const c10::InferenceMode no_inference(false);
    const c10::NoGradGuard no_grad;
    const bool was_attached = full_.is_attached();
    full_.attach();
    try {
      const HopCommunicators& hops = communicators_.gather;
      const int64_t shard_numel = layout_.shard_numel();
      at::Tensor block = options_.shard;
      if (hops.num_nodes() > 1 || block.scalar_type() != options_.parameter_dtype) {
        block = scratch.take(Scratch::Purpose::kBlock, hops.num_nodes() * shard_numel,
                             options_.parameter_dtype, block.device());
        block.narrow(0, shard_numel * hops.slot(), shard_numel).copy_(options_.shard);
      }
      gather_unit(layout_, block, full_.view(0, {layout_.full_numel()}), hops, stream);
    } catch (...) {
      if (!was_attached) full_.detach();
      throw;
    }
    // Writing the buffer moved no version counter of the full parameters. When their values
    // changed, a graph recorded over the old ones must not run backward silently.
    if (gathered_version_.has_value() && gathered_version_ != version) {
      for (const at::Tensor& parameter : full_parameters_) {
        parameter.unsafeGetTensorImpl()->bump_version();
      }
    }
    gathered_version_ = version;
  }
  if (!module_holds_full_) {
    if (exchange_) exchange_(true);
    module_holds_full_ = true;
  }
}

void Unit::reshard(bool release) {
  if (module_holds_full_) {
    if (exchange_) exchange_(false);
    module_holds_full_ = false;
  }
  if (release) full_.detach();
}

// The gradient of a trainable parameter as [region_numel] in the reduce dtype: the tensor of
// autograd itself where its shape and dtype permit, else the next piece of `packed`.
at::Tensor Unit::gradient_region(int trainable_index, at::Tensor& packed) const {
  const ParameterLayout& parameter = gradient_layout_.parameter(trainable_index);
  const size_t index = static_cast<size_t>(trainable_[static_cast<size_t>(trainable_index)]);
  const at::Tensor& gradient = full_parameters_[index].grad();
  if (gradient.defined() && gradient.is_contiguous() &&
      gradient.scalar_type() == options_.reduce_dtype &&
      gradient.numel() == parameter.region_numel) {
    return gradient.view({-1});
  }
  const at::Tensor region = packed.narrow(0, parameter.region_offset, parameter.region_numel);
  if (gradient.defined()) {
    region.narrow(0, 0, parameter.numel()).view(gradient.sizes()).copy_(gradient);
    region.narrow(0, parameter.numel(), parameter.region_numel - parameter.numel()).zero_();
  } else {
    region.zero_();
  }
  return region;
}

void Unit::reduce(Scratch& scratch, Stream& stream) {
  is_deferred_ = false;
  if (trainable_.empty()) return;
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  const HopCommunicators& hops = communicators_.reduce;
  const at::Device device = options_.shard.device();
  at::Tensor packed = scratch.take(Scratch::Purpose::kRegions, gradient_layout_.full_numel(),
                                   options_.reduce_dtype, device);
  std::vector<at::Tensor> regions;
  for (int i = 0; i < num_trainable(); ++i) {
    const at::Tensor& parameter =
        full_parameters_[static_cast<size_t>(trainable_[static_cast<size_t>(i)])];
    const at::Tensor& gradient = parameter.grad();
    if (gradient.defined()) {
      MICS_CHECK(gradient.layout() == at::kStrided,
                 "gradients must be dense: got a sparse gradient of \"",
                 options_.parameters[static_cast<size_t>(trainable_[static_cast<size_t>(i)])].name,
                 "\" (unit \"", name(), "\"). Use sparse=False in the embedding.");
      used_[static_cast<size_t>(i)] = true;
    }
    regions.push_back(gradient_region(i, packed));
  }
  const int64_t block_numel = hops.num_nodes() * gradient_layout_.shard_numel();
  const at::Tensor block =
      scratch.take(Scratch::Purpose::kBlock, block_numel, options_.reduce_dtype, device);
  // The alignment gaps travel over the rails with the chunks and must hold numbers.
  if (gradient_layout_.payload_numel() != gradient_layout_.shard_numel()) block.zero_();
  const at::Tensor own = reduce_unit(gradient_layout_, regions, block, hops, stream);

  if (pending_.defined()) {
    pending_.add_(own);
  } else {
    pending_ = free_accumulation_buffer();
    pending_.copy_(own);
  }
  for (const int index : trainable_)
    full_parameters_[static_cast<size_t>(index)].mutable_grad().reset();
}

// Memory that neither a visible gradient nor hidden_ uses.
at::Tensor Unit::free_accumulation_buffer() {
  const at::ScalarType dtype = accumulation_dtype(options_.reduce_dtype);
  const at::Tensor& gradient = options_.gradient;
  if (gradient.scalar_type() == dtype && !hidden_.is_same(gradient) && !has_visible_gradient()) {
    return gradient;
  }
  // Gradients that came after the unit's reduction, beside a visible one: rare, and freed after
  // use.
  if (separate_.defined() && hidden_.is_same(separate_)) return at::zeros_like(separate_);
  if (!separate_.defined()) separate_ = at::zeros_like(gradient, gradient.options().dtype(dtype));
  return separate_;
}

void Unit::synchronize(Stream& stream) {
  if (!pending_.defined()) return;
  const c10::NoGradGuard no_grad;
  if (communicators_.replicate != nullptr) communicators_.replicate->all_reduce(pending_, stream);
  if (settings_.gradient_factor != 1.0) pending_.mul_(settings_.gradient_factor);
  if (hook_) hook_(pending_);
  if (hidden_.defined()) {
    hidden_.add_(pending_);
  } else {
    hidden_ = pending_;
  }
  pending_.reset();
}

void Unit::expose(const std::vector<bool>& is_used) {
  MICS_INTERNAL_CHECK(is_used.size() == trainable_.size(), "unit \"", name(), "\" has ",
                      trainable_.size(), " trainable parameters, not ", is_used.size(), ".");
  if (!hidden_.defined()) return;
  const c10::NoGradGuard no_grad;
  const bool is_home = hidden_.is_same(options_.gradient);
  for (int i = 0; i < num_trainable(); ++i) {
    if (!is_used[static_cast<size_t>(i)]) continue;
    const UnitParameter& parameter =
        options_.parameters[static_cast<size_t>(trainable_[static_cast<size_t>(i)])];
    at::Tensor home = parameter.gradient;
    const at::Tensor& visible = parameter.sharded.grad();
    // What the user put there instead of our gradient is part of the sum.
    const bool is_foreign = visible.defined() && !visible.is_same(home);
    if (is_home) {
      if (is_foreign) home.add_(visible);
    } else {
      const ParameterLayout& place = gradient_layout_.parameter(i);
      const at::Tensor own = chunk_of(options_.gradient, place);
      if (is_foreign) home.copy_(visible);
      if (visible.defined()) {
        own.add_(chunk_of(hidden_, place));
      } else {
        own.copy_(chunk_of(hidden_, place));
      }
    }
    parameter.sharded.mutable_grad() = home;
  }
  used_.assign(trainable_.size(), false);
  hidden_.reset();
}

bool Unit::has_visible_gradient() const {
  return std::any_of(trainable_.begin(), trainable_.end(), [&](int index) {
    return options_.parameters[static_cast<size_t>(index)].sharded.grad().defined();
  });
}

bool Unit::has_full_gradient() const {
  return std::any_of(trainable_.begin(), trainable_.end(), [&](int index) {
    return full_parameters_[static_cast<size_t>(index)].grad().defined();
  });
}

void Unit::drop_gradients() {
  for (const int index : trainable_)
    full_parameters_[static_cast<size_t>(index)].mutable_grad().reset();
  is_deferred_ = false;
  pending_.reset();
  hidden_.reset();
  used_.assign(trainable_.size(), false);
}

void Unit::reset() {
  drop_gradients();
  reshard(/*release=*/true);
}

}  // namespace mics
