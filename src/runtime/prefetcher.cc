#include "runtime/prefetcher.h"

#include <algorithm>
#include <span>
#include <utility>

#include "plan/check.h"

namespace mics {

namespace {

// How many units that stay full may be skipped when looking ahead: bounds the host's work.
constexpr int kMaxPassedOver = 8;

}  // namespace

Prefetcher::Prefetcher(const std::vector<std::shared_ptr<Unit>>& units, GatherPipeline& gathers,
                       const Depths& depths)
    : units_(units), gathers_(gathers), order_(static_cast<int>(units.size())) {
  for (std::vector<std::vector<int>>& lists : lists_) lists.resize(units.size());
  set_depths(depths);
}

void Prefetcher::set_depths(const Depths& depths) {
  check_depths(depths);
  depths_ = depths;
  upcoming_.reserve(static_cast<size_t>(depths.rail));
}

void Prefetcher::set_list(Phase phase, int unit, std::vector<int> ahead) {
  lists_[static_cast<size_t>(phase)][static_cast<size_t>(unit)] = std::move(ahead);
}

void Prefetcher::end() {
  if (!order_.end_uses()) gathers_.drop_unused();
  if (order_.looks_past()) start_recorded();
  order_.end();
}

void Prefetcher::use(int unit) {
  if (!order_.use(unit)) gathers_.drop_unused();
  MICS_INTERNAL_CHECK(gathers_.start_intra(unit, /*may_grow=*/true), "no memory for a gather.");
  pass(unit);
  gathers_.finish(unit);
}

void Prefetcher::pass(int unit) {
  const auto phase =
      static_cast<size_t>(is_open(Phase::kBackward) ? Phase::kBackward : Phase::kForward);
  const std::vector<int>& list = lists_[phase][static_cast<size_t>(unit)];
  if (list.empty()) return start_recorded();
  for (const int ahead : list) prefetch(ahead);
}

void Prefetcher::prefetch(int unit) {
  MICS_INTERNAL_CHECK(gathers_.start_intra(unit, /*may_grow=*/true), "no memory for a gather.");
  gathers_.retain(unit);
}

void Prefetcher::start_recorded() {
  for (const int ahead : upcoming(depths_.intra)) {
    if (!gathers_.start_intra(ahead, /*may_grow=*/false)) return;
  }
  for (const int ahead : upcoming(depths_.rail)) {
    if (!gathers_.start_rail(ahead, /*may_grow=*/false)) return;
  }
}

// The next `depth` units to gather in the recorded execution order, as far as it is known.
const std::vector<int>& Prefetcher::upcoming(int depth) {
  upcoming_.clear();
  if (depth == 0) return upcoming_;
  const auto add = [&](int unit) {
    if (!stays_full(unit)) upcoming_.push_back(unit);
    return static_cast<int>(upcoming_.size()) < depth;
  };
  for (const int unit : order_.upcoming(depth + kMaxPassedOver)) {
    if (!add(unit)) return upcoming_;
  }
  // A forward that continues no accumulation gathers for itself: weights change before it.
  if (order_.is_forward_next() && !is_any_accumulating(units_)) return upcoming_;
  for (const int unit : order_.following(depth + kMaxPassedOver)) {
    // A unit that is in use now must be freed before it can be gathered again.
    if (gathers_.is_in_use(unit) && !stays_full(unit)) break;
    if (!add(unit)) break;
  }
  return upcoming_;
}

// Whether `unit` needs no gather for its next use: it is full, and stays full after this use.
bool Prefetcher::stays_full(int unit) const {
  const Unit& asked = *units_[static_cast<size_t>(unit)];
  if (asked.parameters().full_is_shard()) return true;
  if (!gathers_.is_kept_full(unit)) return false;
  if (!gathers_.is_in_use(unit)) return true;
  const ResidencySettings& residency = asked.settings().residency;
  return (is_open(Phase::kBackward) ? residency.between_microsteps : residency.after_forward) ==
         Residency::kFull;
}

void Prefetcher::rest(int unit, Residency residency) {
  // Only inside the phase: the last unit of a forward is gathered again for its backward, as the
  // planned bytes count it.
  const std::span<const int> next = order_.upcoming(depths_.intra);
  if (residency != Residency::kFull && std::find(next.begin(), next.end(), unit) != next.end()) {
    return gathers_.keep(unit);
  }
  gathers_.reshard(unit, residency);
}

void Prefetcher::look_past_forward() {
  if (order_.upcoming(1).empty()) start_recorded();
}

}  // namespace mics
