#include "mics/phase_orders.h"

#include <algorithm>
#include <cstddef>

namespace mics {

PhaseOrders::PhaseOrders(int num_units) {
  for (std::vector<Phase>& phases : phases_) phases.resize(static_cast<size_t>(num_units));
}

void PhaseOrders::begin(Kind kind, bool looks_past) {
  kind_ = kind;
  phase_ = nullptr;
  looks_past_ = looks_past;
}

bool PhaseOrders::note_phase(int first_unit) {
  phase_ = &phases_[static_cast<size_t>(*kind_)][static_cast<size_t>(first_unit)];
  phase_->order.begin();
  if (last_phase_ == nullptr || last_phase_->next == phase_) return true;
  const bool is_expected = last_phase_->next == nullptr;
  last_phase_->next = phase_;
  return is_expected;
}

bool PhaseOrders::use(int unit) {
  if (!kind_.has_value()) return true;
  const bool is_phase_expected = phase_ != nullptr || note_phase(unit);
  if (phase_->order.note(unit)) return is_phase_expected;
  ++num_changes_;
  return false;
}

bool PhaseOrders::end_uses() {
  if (phase_ == nullptr || phase_->order.end()) return true;
  ++num_changes_;
  return false;
}

void PhaseOrders::end() {
  if (phase_ != nullptr) last_phase_ = looks_past_ ? phase_ : nullptr;
  kind_.reset();
  phase_ = nullptr;
}

std::span<const int> PhaseOrders::upcoming(int depth) const {
  if (phase_ == nullptr) return {};
  return phase_->order.upcoming(depth);
}

std::span<const int> PhaseOrders::following(int depth) const {
  if (phase_ == nullptr || !looks_past_ || phase_->next == nullptr) return {};
  return phase_->next->order.first(depth);
}

bool PhaseOrders::is_forward_next() const {
  if (phase_ == nullptr || phase_->next == nullptr) return false;
  const std::vector<Phase>& forwards = phases_[static_cast<size_t>(Kind::kForward)];
  return phase_->next >= forwards.data() && phase_->next < forwards.data() + forwards.size();
}

void PhaseOrders::forget() {
  for (std::vector<Phase>& phases : phases_) std::fill(phases.begin(), phases.end(), Phase());
  kind_.reset();
  phase_ = nullptr;
  last_phase_ = nullptr;
}

}  // namespace mics
