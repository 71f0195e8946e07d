#include "mics/unit_gradients.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/_foreach_add.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/_foreach_zero.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "mics/communicator.h"
#include "plan/check.h"
#include "runtime/sum_memory.h"

namespace mics {

namespace {

at::Tensor chunk_of(const at::Tensor& buffer, const ParameterLayout& parameter) {
  return buffer.narrow(0, parameter.shard_offset, parameter.chunk_numel);
}

// Row: state; column: the next one. In the order of GradientState; see the header.
constexpr bool kIsLegal[4][4] = {
    {false, true, false, false},  // kNone
    {false, true, true, false},   // kAccumulated
    {true, false, false, true},   // kSynchronized
    {false, false, true, true},   // kBoth
};

class ArrivalHook final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit ArrivalHook(std::function<void()> arrived) : arrived_(std::move(arrived)) {}
  void operator()(const torch::autograd::Variable& /*parameter*/) override { arrived_(); }

 private:
  const std::function<void()> arrived_;
};

}  // namespace

UnitGradients::UnitGradients(const UnitOptions& options, UnitParameters& parameters)
    : parameters_(parameters),
      reduce_dtype_(options.reduce_dtype),
      gradient_(options.gradient),
      layout_({}, options.partition_size, /*alignment=*/1) {
  for (const UnitParameter& parameter : options.parameters) {
    gradients_.push_back(parameter.gradient);
  }
  lay_out();
}

void UnitGradients::lay_out() {
  std::vector<ParameterShape> shapes;
  trainable_.clear();
  for (int i = 0; i < parameters_.size(); ++i) {
    if (!gradients_[static_cast<size_t>(i)].defined()) continue;
    trainable_.push_back(i);
    shapes.push_back({parameters_.parameter(i).sizes});
  }
  layout_ = ShardLayout(shapes, layout_.partition_size(),
                        layout_alignment(parameters_.dtype(), reduce_dtype_));
  used_.assign(trainable_.size(), false);
  const bool has_sums = !trainable_.empty();  // a frozen unit may have any dtype
  sums_ = std::make_shared<SumMemory>(gradient_,
                                      has_sums ? accumulation_dtype(reduce_dtype_) : at::kFloat);
  MICS_CHECK(trainable_.empty() || gradient_.numel() == layout_.shard_numel(),
             "the gradient must have the layout's length: got numel=", gradient_.numel(),
             ", shard_numel=", layout_.shard_numel(), " (unit \"", parameters_.unit_name(), "\").");
}

void UnitGradients::change_state(GradientState next) {
  MICS_INTERNAL_CHECK(kIsLegal[static_cast<size_t>(state_)][static_cast<size_t>(next)],
                      "gradients of unit \"", parameters_.unit_name(), "\" go from state ",
                      static_cast<int>(state_), " to ", static_cast<int>(next), ".");
  state_ = next;
}

bool UnitGradients::has_full() const {
  return std::any_of(trainable_.begin(), trainable_.end(),
                     [&](int index) { return parameters_.full(index).grad().defined(); });
}

// Whether autograd's own tensor can be reduced in place, without packing.
bool UnitGradients::fits_region(const at::Tensor& gradient, int64_t region_numel) const {
  return gradient.defined() && gradient.is_contiguous() &&
         gradient.scalar_type() == reduce_dtype_ && gradient.numel() == region_numel;
}

void UnitGradients::check_dense(const at::Tensor& gradient, int index) const {
  MICS_CHECK(gradient.layout() == at::kStrided,
             "gradients must be dense: got a sparse gradient of \"",
             parameters_.parameter(trainable(index)).name, "\" (unit \"", parameters_.unit_name(),
             "\"). Use sparse=False in the embedding.");
}

int64_t UnitGradients::count_unfit() const {
  int64_t numel = 0;
  for (int i = 0; i < num_trainable(); ++i) {
    const at::Tensor& gradient = full(i).grad();
    if (gradient.defined()) check_dense(gradient, i);
    const int64_t region_numel = layout_.parameter(i).region_numel;
    if (!fits_region(gradient, region_numel)) numel += region_numel;
  }
  return numel;
}

std::vector<at::Tensor> UnitGradients::take_full(const std::function<at::Tensor(int64_t)>& pack) {
  is_deferred_ = false;
  if (!next_sum_.defined()) next_sum_ = free_buffer();
  const int64_t packed_numel = count_unfit();
  const at::Tensor packed = packed_numel == 0 ? at::Tensor() : pack(packed_numel);
  int64_t offset = 0;
  std::vector<at::Tensor> regions;
  std::vector<at::Tensor> gaps;
  std::vector<at::Tensor> places;
  std::vector<at::Tensor> gradients;
  for (int i = 0; i < num_trainable(); ++i) {
    const ParameterLayout& parameter = layout_.parameter(i);
    at::Tensor gradient = std::move(full(i).mutable_grad());
    full(i).mutable_grad().reset();
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
  // One call for all: on a GPU one kernel casts and packs all gradients of a unit.
  if (!gaps.empty()) at::_foreach_zero_(gaps);
  if (!places.empty()) at::_foreach_copy_(places, gradients);
  return regions;
}

void UnitGradients::sum_full() {
  is_deferred_ = false;
  const bool is_first = !accumulated_.defined();
  const at::Tensor sum = is_first ? new_accumulated() : accumulated_;
  std::vector<at::Tensor> missing;
  std::vector<at::Tensor> places;
  std::vector<at::Tensor> gradients;
  for (int i = 0; i < num_trainable(); ++i) {
    at::Tensor gradient = std::move(full(i).mutable_grad());
    full(i).mutable_grad().reset();
    const at::Tensor place = chunk_of(sum, layout_.parameter(i));
    if (!gradient.defined()) {
      missing.push_back(place);
      continue;
    }
    check_dense(gradient, i);
    used_[static_cast<size_t>(i)] = true;
    places.push_back(place.view(gradient.sizes()));
    gradients.push_back(std::move(gradient));
  }
  if (is_first && !missing.empty()) at::_foreach_zero_(missing);
  if (places.empty()) return;
  if (is_first) {
    at::_foreach_copy_(places, gradients);
  } else {
    at::_foreach_add_(places, gradients);
  }
}

void UnitGradients::watch(const std::function<void()>& arrived) {
  if (is_watched_) return;
  is_watched_ = true;
  for (int i = 0; i < parameters_.size(); ++i) {
    torch::autograd::impl::set_post_acc_grad_hooks(parameters_.full(i),
                                                   std::make_unique<ArrivalHook>(arrived));
  }
}

bool UnitGradients::has_visible() const {
  return std::any_of(trainable_.begin(), trainable_.end(), [&](int index) {
    return parameters_.parameter(index).sharded.grad().defined();
  });
}

at::Tensor UnitGradients::free_buffer() { return sums_->take(synchronized_, has_visible()); }

void UnitGradients::note_sum() {
  change_state(synchronized_.defined() ? GradientState::kBoth : GradientState::kAccumulated);
}

const at::Tensor& UnitGradients::new_accumulated() {
  note_sum();
  if (!next_sum_.defined()) next_sum_ = free_buffer();
  accumulated_ = next_sum_;
  return accumulated_;
}

void UnitGradients::set_has_block(bool has_block) {
  if (has_block) note_sum();
  has_block_ = has_block;
}

void UnitGradients::note_synchronized() {
  change_state(GradientState::kSynchronized);
  if (!synchronized_.defined()) synchronized_ = accumulated_;
  accumulated_.reset();
  next_sum_.reset();
}

void UnitGradients::publish(const std::vector<bool>& is_used) {
  MICS_INTERNAL_CHECK(is_used.size() == trainable_.size(), "unit \"", parameters_.unit_name(),
                      "\" has ", trainable_.size(), " trainable parameters, not ", is_used.size(),
                      ".");
  if (!synchronized_.defined()) return;
  const c10::NoGradGuard no_grad;
  if (hook_) hook_(synchronized_);
  const bool is_home = synchronized_.is_same(gradient_);
  for (int i = 0; i < num_trainable(); ++i) {
    if (!is_used[static_cast<size_t>(i)]) continue;
    at::Tensor home = gradients_[static_cast<size_t>(trainable(i))];
    const at::Tensor& visible = sharded(i).grad();
    // If the user has put another gradient there, it is part of the sum.
    const bool is_foreign = visible.defined() && !visible.is_same(home);
    if (is_home) {
      if (is_foreign) home.add_(visible);
    } else {
      const ParameterLayout& place = layout_.parameter(i);
      const at::Tensor own = chunk_of(gradient_, place);
      if (is_foreign) home.copy_(visible);
      if (visible.defined()) {
        own.add_(chunk_of(synchronized_, place));
      } else {
        own.copy_(chunk_of(synchronized_, place));
      }
    }
    sharded(i).mutable_grad() = home;
  }
  change_state(GradientState::kNone);
  used_.assign(trainable_.size(), false);
  synchronized_.reset();
}

void UnitGradients::run_hooks(const std::vector<bool>& is_used) const {
  for (int i = 0; i < num_trainable(); ++i) {
    if (!is_used[static_cast<size_t>(i)]) continue;
    if (torch::autograd::impl::get_autograd_meta(sharded(i)) == nullptr) continue;
    if (auto& hook = torch::autograd::impl::post_acc_grad_hooks(sharded(i))) (*hook)(sharded(i));
  }
}

void UnitGradients::drop() {
  for (const int index : trainable_) parameters_.full(index).mutable_grad().reset();
  is_deferred_ = false;
  accumulated_.reset();
  next_sum_.reset();
  synchronized_.reset();
  has_block_ = false;
  state_ = GradientState::kNone;
  used_.assign(trainable_.size(), false);
}

void UnitGradients::change_trainable(const std::vector<at::Tensor>& gradients,
                                     at::Tensor gradient) {
  MICS_INTERNAL_CHECK(!has_block_, "unit \"", parameters_.unit_name(),
                      "\" holds a gradient block.");
  const ShardLayout old_layout = layout_;
  const std::vector<bool> old_used = used_;
  std::vector<int> old_place(gradients.size(), -1);
  for (int i = 0; i < num_trainable(); ++i) old_place[static_cast<size_t>(trainable(i))] = i;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const UnitParameter& parameter = parameters_.parameter(static_cast<int>(i));
    MICS_INTERNAL_CHECK(gradients[i].defined() || old_place[i] < 0 || !is_accumulating(), "\"",
                        parameter.name, "\" loses a part of its gradient.");
    parameters_.full(static_cast<int>(i)).set_requires_grad(parameter.sharded.requires_grad());
  }
  gradients_ = gradients;
  gradient_ = std::move(gradient);
  lay_out();
  next_sum_.reset();
  const c10::NoGradGuard no_grad;
  const auto place_of = [&](int i) { return old_place[static_cast<size_t>(trainable(i))]; };
  for (at::Tensor* sum : {&accumulated_, &synchronized_}) {
    if (!sum->defined()) continue;
    const at::Tensor old = *sum;
    *sum = at::zeros({layout_.shard_numel()}, old.options());
    for (int i = 0; i < num_trainable(); ++i) {
      if (place_of(i) < 0) continue;
      chunk_of(*sum, layout_.parameter(i)).copy_(chunk_of(old, old_layout.parameter(place_of(i))));
    }
  }
  if (accumulated_.defined()) next_sum_ = accumulated_;
  for (int i = 0; i < num_trainable(); ++i) {
    if (place_of(i) < 0) continue;
    used_[static_cast<size_t>(i)] = old_used[static_cast<size_t>(place_of(i))];
  }
}

}  // namespace mics
