#include "mics/use_order.h"

#include <algorithm>

namespace mics {

bool UseOrder::note(int unit) {
  const bool is_new = position_ == recorded_.size();
  const bool is_expected = is_new || recorded_[position_] == unit;
  if (!is_expected) recorded_.resize(position_);
  if (position_ == recorded_.size()) recorded_.push_back(unit);
  ++position_;
  return is_expected;
}

bool UseOrder::end() {
  const bool is_complete = position_ == recorded_.size();
  recorded_.resize(position_);
  return is_complete;
}

std::span<const int> UseOrder::first(int depth) const {
  return std::span(recorded_).first(std::min(recorded_.size(), static_cast<size_t>(depth)));
}

std::span<const int> UseOrder::upcoming(int depth) const {
  const size_t left = recorded_.size() - position_;
  return std::span(recorded_).subspan(position_, std::min(left, static_cast<size_t>(depth)));
}

}  // namespace mics
