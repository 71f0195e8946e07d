#include "mics/unit.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <numeric>

#include "runtime/sum_memory.h"

namespace mics {

Unit::Unit(const UnitOptions& options, UnitCommunicators communicators)
    : communicators_(communicators),
      has_nested_units_(options.has_nested_units),
      parameters_(options),
      gradients_(options, parameters_) {}

bool Unit::has_block() const {
  if (parameters_.full_is_shard() || is_whole()) return false;
  return num_nodes() > 1 || parameters_.shard().scalar_type() != parameters_.dtype();
}

int64_t Unit::block_nbytes() const {
  if (!has_block()) return 0;
  return num_nodes() * parameters_.layout().shard_numel() *
         static_cast<int64_t>(c10::elementSize(parameters_.dtype()));
}

bool Unit::keeps_full() const {
  const ResidencySettings& residency = settings_.residency;
  return has_nested_units_ || is_lent_ || residency.after_forward == Residency::kFull ||
         residency.between_microsteps == Residency::kFull;
}

bool Unit::keeps_block() const {
  const ResidencySettings& residency = settings_.residency;
  return residency.after_forward == Residency::kBlock ||
         residency.between_microsteps == Residency::kBlock;
}

bool Unit::sums_in_place() const {
  const at::ScalarType reduce_dtype = gradients_.reduce_dtype();
  return is_whole() && c10::promoteTypes(parameters_.dtype(), reduce_dtype) == reduce_dtype;
}

int64_t Unit::packed_numel() const {
  if (sums_in_place()) return 0;
  const bool casts = parameters_.dtype() != gradients_.reduce_dtype();
  const ShardLayout& layout = gradients_.layout();
  int64_t numel = 0;
  for (int i = 0; i < layout.num_parameters(); ++i) {
    const ParameterLayout& parameter = layout.parameter(i);
    if (casts || parameter.numel() != parameter.region_numel) numel += parameter.region_numel;
  }
  return numel;
}

bool Unit::accumulates_block() const {
  return communicators_.reduce.num_nodes() > 1 &&
         settings_.residency.gradient_accumulation == Residency::kBlock;
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

bool is_any_accumulating(const std::vector<std::shared_ptr<Unit>>& units) {
  return std::any_of(units.begin(), units.end(), [](const std::shared_ptr<Unit>& unit) {
    return unit->gradients().is_accumulating();
  });
}

std::vector<std::string> unfinished_units(const std::vector<std::shared_ptr<Unit>>& units) {
  std::vector<std::string> names;
  for (const std::shared_ptr<Unit>& unit : units) {
    const UnitGradients& gradients = unit->gradients();
    if (gradients.state() != GradientState::kNone || gradients.has_full()) {
      names.push_back(unit->name());
    }
  }
  return names;
}

int64_t unplanned_sum_nbytes(const std::vector<std::shared_ptr<Unit>>& units) {
  return std::accumulate(units.begin(), units.end(), int64_t{0},
                         [](int64_t nbytes, const std::shared_ptr<Unit>& unit) {
                           return nbytes + unit->gradients().sum_memory().unplanned_nbytes();
                         });
}

bool match_requires_grad(const std::vector<std::shared_ptr<Unit>>& units) {
  return std::all_of(units.begin(), units.end(), [](const std::shared_ptr<Unit>& unit) {
    return unit->parameters().matches_requires_grad();
  });
}

}  // namespace mics
