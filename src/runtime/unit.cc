#include "mics/unit.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

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

// One rank and one dtype: the shard has every row where the full parameters want it. So it has
// where there are none.
bool is_full(const ShardLayout& layout, const UnitOptions& options) {
  if (layout.full_numel() == 0) return true;
  if (options.partition_size != 1 || options.shard.scalar_type() != options.parameter_dtype ||
      layout.full_numel() != layout.shard_numel()) {
    return false;
  }
  for (int i = 0; i < layout.num_parameters(); ++i) {
    if (layout.parameter(i).region_offset != layout.parameter(i).shard_offset) return false;
  }
  return true;
}

at::Tensor chunk_of(const at::Tensor& buffer, const ParameterLayout& parameter) {
  return buffer.narrow(0, parameter.shard_offset, parameter.chunk_numel);
}

}  // namespace

Unit::Unit(UnitOptions options, UnitCommunicators communicators)
    : options_(std::move(options)),
      communicators_(communicators),
      layout_(layout_of(options_, /*only_trainable=*/false)),
      full_is_shard_(is_full(layout_, options_)),
      gradient_layout_(layout_of(options_, /*only_trainable=*/true)),
      full_(layout_.full_numel(), options_.parameter_dtype, options_.shard.device(),
            options_.name) {
  find_trainable();
  MICS_CHECK(options_.shard.numel() == layout_.shard_numel(),
             "the shard must have the layout's length: got numel=", options_.shard.numel(),
             ", shard_numel=", layout_.shard_numel(), " (unit \"", name(), "\").");
}

void Unit::find_trainable() {
  trainable_.clear();
  for (int i = 0; i < layout_.num_parameters(); ++i) {
    if (options_.parameters[static_cast<size_t>(i)].is_trainable) trainable_.push_back(i);
  }
  used_.assign(trainable_.size(), false);
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
  for (const UnitParameter& parameter : options_.parameters) {
    version += parameter.sharded._version();
    if (parameter.local.defined()) version += parameter.local._version();
  }
  return version;
}

bool Unit::matches_requires_grad() const {
  for (size_t i = 0; i < full_parameters_.size(); ++i) {
    if (options_.parameters[i].sharded.requires_grad() != full_parameters_[i].requires_grad()) {
      return false;
    }
  }
  return true;
}

void Unit::change_trainable(const std::vector<at::Tensor>& gradients, at::Tensor gradient) {
  MICS_INTERNAL_CHECK(!has_pending_block_, "unit \"", name(), "\" holds a gradient block.");
  const ShardLayout old_layout = gradient_layout_;
  std::vector<int> old_place(options_.parameters.size(), -1);
  for (size_t i = 0; i < trainable_.size(); ++i) {
    old_place[static_cast<size_t>(trainable_[i])] = static_cast<int>(i);
  }
  const std::vector<bool> old_used = used_;
  options_.gradient = std::move(gradient);
  for (size_t i = 0; i < options_.parameters.size(); ++i) {
    UnitParameter& parameter = options_.parameters[i];
    parameter.gradient = gradients[i];
    parameter.is_trainable = gradients[i].defined();
    MICS_INTERNAL_CHECK(parameter.is_trainable || old_place[i] < 0 || !is_accumulating(), "\"",
                        parameter.name, "\" loses a part of its gradient.");
    full_parameters_[i].set_requires_grad(parameter.sharded.requires_grad());
  }
  gradient_layout_ = layout_of(options_, /*only_trainable=*/true);
  find_trainable();
  separate_.reset();
  const c10::NoGradGuard no_grad;
  for (at::Tensor* sum : {&pending_, &hidden_}) {
    if (!sum->defined()) continue;
    const at::Tensor old = *sum;
    *sum = at::zeros({gradient_layout_.shard_numel()}, old.options());
    for (int i = 0; i < num_trainable(); ++i) {
      const int place = old_place[static_cast<size_t>(trainable_[static_cast<size_t>(i)])];
      if (place < 0) continue;
      chunk_of(*sum, gradient_layout_.parameter(i))
          .copy_(chunk_of(old, old_layout.parameter(place)));
    }
  }
  for (int i = 0; i < num_trainable(); ++i) {
    const int place = old_place[static_cast<size_t>(trainable_[static_cast<size_t>(i)])];
    if (place >= 0) used_[static_cast<size_t>(i)] = old_used[static_cast<size_t>(place)];
  }
}

bool Unit::has_block() const {
  if (full_is_shard_) return false;
  return num_nodes() > 1 || options_.shard.scalar_type() != options_.parameter_dtype;
}

int64_t Unit::block_nbytes() const {
  if (!has_block()) return 0;
  return num_nodes() * layout_.shard_numel() *
         static_cast<int64_t>(c10::elementSize(options_.parameter_dtype));
}

bool Unit::keeps_full() const {
  const ResidencySettings& residency = settings_.residency;
  return options_.is_outer || is_lent_ || residency.after_forward == Residency::kFull ||
         residency.between_microsteps == Residency::kFull;
}

bool Unit::keeps_block() const {
  const ResidencySettings& residency = settings_.residency;
  return residency.after_forward == Residency::kBlock ||
         residency.between_microsteps == Residency::kBlock;
}

bool Unit::accumulates_block() const {
  return communicators_.reduce.num_nodes() > 1 &&
         settings_.residency.gradient_accumulation == Residency::kBlock;
}

int64_t Unit::packed_gradient_numel() const {
  const bool casts = options_.parameter_dtype != options_.reduce_dtype;
  int64_t numel = 0;
  for (int i = 0; i < gradient_layout_.num_parameters(); ++i) {
    const ParameterLayout& parameter = gradient_layout_.parameter(i);
    if (casts || parameter.numel() != parameter.region_numel) numel += parameter.region_numel;
  }
  return numel;
}

void Unit::note_gathered(int64_t version) {
  if (gathered_version_.has_value() && gathered_version_ != version) {
    for (const at::Tensor& parameter : full_parameters_) {
      parameter.unsafeGetTensorImpl()->bump_version();
    }
  }
  gathered_version_ = version;
}

void Unit::exchange(bool full) {
  if (module_holds_full_ == full) return;
  if (exchange_) exchange_(full);
  module_holds_full_ = full;
}

// Whether autograd's own tensor can be reduced where it is.
bool Unit::fits_region(const at::Tensor& gradient, int64_t region_numel) const {
  return gradient.defined() && gradient.is_contiguous() &&
         gradient.scalar_type() == options_.reduce_dtype && gradient.numel() == region_numel;
}

std::vector<at::Tensor> Unit::take_full_gradients(const std::function<at::Tensor(int64_t)>& pack) {
  is_deferred_ = false;
  std::vector<at::Tensor> regions;
  int64_t packed_numel = 0;
  for (int i = 0; i < num_trainable(); ++i) {
    const auto index = static_cast<size_t>(trainable_[static_cast<size_t>(i)]);
    const at::Tensor& gradient = full_parameters_[index].grad();
    MICS_CHECK(!gradient.defined() || gradient.layout() == at::kStrided,
               "gradients must be dense: got a sparse gradient of \"",
               options_.parameters[index].name, "\" (unit \"", name(),
               "\"). Use sparse=False in the embedding.");
    const int64_t region_numel = gradient_layout_.parameter(i).region_numel;
    if (!fits_region(gradient, region_numel)) packed_numel += region_numel;
  }
  const at::Tensor packed = packed_numel == 0 ? at::Tensor() : pack(packed_numel);
  int64_t offset = 0;
  std::vector<at::Tensor> gaps;
  std::vector<at::Tensor> places;
  std::vector<at::Tensor> gradients;
  for (int i = 0; i < num_trainable(); ++i) {
    const auto index = static_cast<size_t>(trainable_[static_cast<size_t>(i)]);
    const ParameterLayout& parameter = gradient_layout_.parameter(i);
    at::Tensor gradient = std::move(full_parameters_[index].mutable_grad());
    full_parameters_[index].mutable_grad().reset();
    if (gradient.defined()) used_[static_cast<size_t>(i)] = true;
    if (fits_region(gradient, parameter.region_numel)) {
      // A view without autograd's bookkeeping: nobody differentiates it.
      const at::AutoDispatchBelowADInplaceOrView no_bookkeeping;
      regions.push_back(gradient.dim() == 1 ? gradient : gradient.view({-1}));
      continue;
    }
    const at::Tensor region = packed.narrow(0, offset, parameter.region_numel);
    offset += parameter.region_numel;
    const int64_t numel = gradient.defined() ? parameter.numel() : 0;
    if (numel < parameter.region_numel) {
      gaps.push_back(region.narrow(0, numel, parameter.region_numel - numel));
    }
    if (gradient.defined()) {
      places.push_back(region.narrow(0, 0, numel).view(gradient.sizes()));
      gradients.push_back(std::move(gradient));
    }
    regions.push_back(region);
  }
  // One call for all: on a GPU one kernel casts and packs the gradients of a unit.
  if (!gaps.empty()) at::_foreach_zero_(gaps);
  if (!places.empty()) at::_foreach_copy_(places, gradients);
  return regions;
}

const at::Tensor& Unit::new_pending() {
  pending_ = free_accumulation_buffer();
  return pending_;
}

void Unit::hide_pending() {
  MICS_INTERNAL_CHECK(!hidden_.defined(), "unit \"", name(), "\" hides two gradients.");
  hidden_ = std::move(pending_);
  pending_.reset();
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

void Unit::expose(const std::vector<bool>& is_used) {
  MICS_INTERNAL_CHECK(is_used.size() == trainable_.size(), "unit \"", name(), "\" has ",
                      trainable_.size(), " trainable parameters, not ", is_used.size(), ".");
  if (!hidden_.defined()) return;
  const c10::NoGradGuard no_grad;
  if (hook_) hook_(hidden_);
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

void Unit::run_gradient_hooks(const std::vector<bool>& is_used) const {
  for (size_t i = 0; i < trainable_.size(); ++i) {
    if (!is_used[i]) continue;
    const at::Tensor& sharded = options_.parameters[static_cast<size_t>(trainable_[i])].sharded;
    if (torch::autograd::impl::get_autograd_meta(sharded) == nullptr) continue;
    if (auto& hook = torch::autograd::impl::post_acc_grad_hooks(sharded)) (*hook)(sharded);
  }
}

bool Unit::may_have_hooks() const {
  return std::any_of(options_.parameters.begin(), options_.parameters.end(),
                     [](const UnitParameter& parameter) {
                       const at::Tensor& sharded = parameter.sharded;
                       return torch::autograd::impl::get_autograd_meta(sharded) != nullptr &&
                              !torch::autograd::impl::hooks(sharded).empty();
                     });
}

namespace {

class ArrivalHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit ArrivalHook(std::function<void()> arrived) : arrived_(std::move(arrived)) {}
  void operator()(const torch::autograd::Variable& /*parameter*/) override { arrived_(); }

 private:
  const std::function<void()> arrived_;
};

}  // namespace

void Unit::watch_gradients(const std::function<void()>& arrived) {
  if (watches_gradients_) return;
  watches_gradients_ = true;
  for (const at::Tensor& parameter : full_parameters_) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameter,
                                                   std::make_unique<ArrivalHook>(arrived));
  }
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
  has_pending_block_ = false;
  hidden_.reset();
  used_.assign(trainable_.size(), false);
}

std::vector<Communicator*> hop_communicators(const std::vector<std::shared_ptr<Unit>>& units) {
  std::vector<Communicator*> found;
  for (const std::shared_ptr<Unit>& unit : units) {
    const HopCommunicators& gather = unit->communicators().gather;
    const HopCommunicators& reduce = unit->communicators().reduce;
    for (Communicator* communicator : {gather.rail, gather.intra, reduce.rail, reduce.intra}) {
      if (communicator == nullptr) continue;
      if (std::find(found.begin(), found.end(), communicator) == found.end()) {
        found.push_back(communicator);
      }
    }
  }
  return found;
}

}  // namespace mics
