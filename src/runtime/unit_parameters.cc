#include "mics/unit_parameters.h"

#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <utility>

#include "plan/check.h"
#include "runtime/full_buffer.h"

namespace mics {

int64_t layout_alignment(at::ScalarType parameter_dtype, at::ScalarType reduce_dtype) {
  const size_t narrowest =
      std::min(c10::elementSize(parameter_dtype), c10::elementSize(reduce_dtype));
  return static_cast<int64_t>(16 / narrowest);
}

namespace {

ShardLayout layout_of(const UnitOptions& options) {
  std::vector<ParameterShape> shapes;
  for (const UnitParameter& parameter : options.parameters) shapes.push_back({parameter.sizes});
  return ShardLayout(shapes, options.partition_size,
                     layout_alignment(options.parameter_dtype, options.reduce_dtype));
}

// Whether the shard can serve as the full parameters: with one rank and one dtype, if every row is
// at its place, or if there are no rows.
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

// Row: state; column: the next one. In the order of ParameterState; see the header.
constexpr bool kIsLegal[3][3] = {
    {false, true, false},  // kSharded
    {true, false, true},   // kAttached
    {false, true, false},  // kRegistered
};

}  // namespace

UnitParameters::UnitParameters(const UnitOptions& options)
    : unit_name_(options.name),
      parameters_(options.parameters),
      shard_(options.shard),
      dtype_(options.parameter_dtype),
      layout_(layout_of(options)),
      full_is_shard_(is_full(layout_, options)),
      full_buffer_(
          std::make_unique<FullBuffer>(layout_.full_numel(), dtype_, shard_.device(), unit_name_)) {
  MICS_CHECK(shard_.numel() == layout_.shard_numel(),
             "the shard must have the layout's length: got numel=", shard_.numel(),
             ", shard_numel=", layout_.shard_numel(), " (unit \"", unit_name_, "\").");
}

UnitParameters::~UnitParameters() = default;

void UnitParameters::change_state(ParameterState next) {
  MICS_INTERNAL_CHECK(kIsLegal[static_cast<size_t>(state_)][static_cast<size_t>(next)], "unit \"",
                      unit_name_, "\" goes from state ", static_cast<int>(state_), " to ",
                      static_cast<int>(next), ".");
  state_ = next;
}

int64_t UnitParameters::full_nbytes() const { return full_is_shard_ ? 0 : full_buffer_->nbytes(); }

std::vector<at::Tensor> UnitParameters::full_views() const {
  std::vector<at::Tensor> views;
  for (int i = 0; i < size(); ++i) {
    views.push_back(full_buffer_->view(layout_.parameter(i).region_offset, parameter(i).sizes));
  }
  return views;
}

void UnitParameters::set_full(std::vector<at::Tensor> full_parameters) {
  MICS_CHECK(full_parameters.size() == parameters_.size(),
             "a unit needs one full parameter per parameter: got ", full_parameters.size(), " for ",
             parameters_.size(), " (unit \"", unit_name_, "\").");
  full_parameters_ = std::move(full_parameters);
}

void UnitParameters::attach(const at::Tensor& memory) {
  MICS_INTERNAL_CHECK(!is_unsharded(), "unit \"", unit_name_, "\" is unsharded already.");
  change_state(ParameterState::kAttached);
  full_buffer_->attach(memory);
}

void UnitParameters::detach() {
  if (state_ == ParameterState::kSharded) return;
  change_state(ParameterState::kSharded);
  full_buffer_->detach();
}

void UnitParameters::set_registration(std::function<void(ParameterKind)> registration) {
  registration_ = std::move(registration);
}

void UnitParameters::register_parameters(ParameterKind kind) {
  const bool wants_full = kind == ParameterKind::kFull;
  if (wants_full == (state_ == ParameterState::kRegistered)) return;
  if (!wants_full) change_state(ParameterState::kAttached);
  if (registration_) registration_(kind);
  if (wants_full) change_state(ParameterState::kRegistered);
}

int64_t UnitParameters::shard_version() const {
  int64_t version = shard_._version();
  for (const UnitParameter& parameter : parameters_) {
    version += parameter.sharded._version();
    if (parameter.local.defined()) version += parameter.local._version();
  }
  return version;
}

void UnitParameters::note_gathered(int64_t version) {
  if (gathered_version_.has_value() && gathered_version_ != version) {
    for (const at::Tensor& parameter : full_parameters_) {
      parameter.unsafeGetTensorImpl()->bump_version();
    }
  }
  gathered_version_ = version;
}

bool UnitParameters::matches_requires_grad() const {
  for (size_t i = 0; i < full_parameters_.size(); ++i) {
    if (parameters_[i].sharded.requires_grad() != full_parameters_[i].requires_grad()) return false;
  }
  return true;
}

bool UnitParameters::may_have_gradient_hooks() const {
  return std::any_of(parameters_.begin(), parameters_.end(), [](const UnitParameter& parameter) {
    return torch::autograd::impl::get_autograd_meta(parameter.sharded) != nullptr &&
           !torch::autograd::impl::hooks(parameter.sharded).empty();
  });
}

}  // namespace mics
