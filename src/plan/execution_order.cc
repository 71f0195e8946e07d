#include "plan/execution_order.h"

#include <algorithm>

namespace mics {

bool PhaseRecord::use(int unit) {
  const bool is_expected = position_ == units_.size() || units_[position_] == unit;
  if (!is_expected) units_.resize(position_);
  if (position_ == units_.size()) units_.push_back(unit);
  ++position_;
  return is_expected;
}

bool PhaseRecord::end() {
  const bool is_complete = position_ == units_.size();
  units_.resize(position_);
  return is_complete;
}

std::span<const int> PhaseRecord::first(int depth) const {
  return std::span(units_).first(std::min(units_.size(), static_cast<size_t>(depth)));
}

std::span<const int> PhaseRecord::upcoming(int depth) const {
  const size_t num_left = units_.size() - position_;
  return std::span(units_).subspan(position_, std::min(num_left, static_cast<size_t>(depth)));
}

ExecutionOrder::ExecutionOrder(int num_units) {
  for (std::vector<RecordedPhase>& phases : phases_) phases.resize(static_cast<size_t>(num_units));
}

void ExecutionOrder::begin(Phase kind, bool looks_past) {
  kind_ = kind;
  phase_ = nullptr;
  looks_past_ = looks_past;
}

bool ExecutionOrder::enter_phase(int first_unit) {
  phase_ = &phases_[static_cast<size_t>(*kind_)][static_cast<size_t>(first_unit)];
  phase_->record.begin();
  if (last_phase_ == nullptr || last_phase_->next == phase_) return true;
  const bool is_expected = last_phase_->next == nullptr;
  last_phase_->next = phase_;
  return is_expected;
}

bool ExecutionOrder::use(int unit) {
  if (!kind_.has_value()) return true;
  const bool is_phase_expected = phase_ != nullptr || enter_phase(unit);
  if (phase_->record.use(unit)) return is_phase_expected;
  ++num_changes_;
  return false;
}

bool ExecutionOrder::end_uses() {
  if (phase_ == nullptr || phase_->record.end()) return true;
  ++num_changes_;
  return false;
}

void ExecutionOrder::end() {
  if (phase_ != nullptr) last_phase_ = looks_past_ ? phase_ : nullptr;
  kind_.reset();
  phase_ = nullptr;
}

std::span<const int> ExecutionOrder::upcoming(int depth) const {
  if (phase_ == nullptr) return {};
  return phase_->record.upcoming(depth);
}

std::span<const int> ExecutionOrder::following(int depth) const {
  if (phase_ == nullptr || !looks_past_ || phase_->next == nullptr) return {};
  return phase_->next->record.first(depth);
}

bool ExecutionOrder::is_forward_next() const {
  if (phase_ == nullptr || phase_->next == nullptr) return false;
  const std::vector<RecordedPhase>& forwards = phases_[static_cast<size_t>(Phase::kForward)];
  return phase_->next >= forwards.data() && phase_->next < forwards.data() + forwards.size();
}

void ExecutionOrder::forget() {
  for (std::vector<RecordedPhase>& phases : phases_)
    std::fill(phases.begin(), phases.end(), RecordedPhase());
  kind_.reset();
  phase_ = nullptr;
  last_phase_ = nullptr;
}

}  // namespace mics
