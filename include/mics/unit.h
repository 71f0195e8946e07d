// Unit: parameters that are gathered, reduced and freed together, with their gradients, their
// settings, and where their collectives run.
//
// Source: MiCS paper section 3.4; docs/design.md.
//
// Thread safety: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mics/communicator.h"
#include "mics/residency.h"
#include "mics/unit_collectives.h"
#include "mics/unit_gradients.h"
#include "mics/unit_parameters.h"

namespace mics {

// Where a unit's collectives run. All outlive the unit.
struct UnitCommunicators {
  HopCommunicators gather;
  HopCommunicators reduce;
  Communicator* replicate = nullptr;  // null when there is one replica
};

// How a unit behaves; each may be changed between steps.
struct UnitSettings {
  // What stays until backward needs the unit, and until the next forward does. What is kept is
  // gathered again when the shard was written.
  ResidencySettings residency;
  bool unshard_in_backward = true;
  bool reduce_gradients = true;  // false: keep full gradients, reduce nothing (accumulate="local")
  bool synchronize_gradients = true;  // false: hop 1 only; the accumulation goes on
  double gradient_factor = 1.0;       // multiplies the sum over all ranks, once, in fp32
  // This backward is an accumulation boundary for the unit.
  [[nodiscard]] bool is_boundary() const { return reduce_gradients && synchronize_gradients; }
};

class Unit {
 public:
  // Throws InvalidArgument when a tensor does not fit the layout.
  Unit(const UnitOptions& options, UnitCommunicators communicators);

  [[nodiscard]] const std::string& name() const { return parameters_.unit_name(); }
  [[nodiscard]] UnitParameters& parameters() { return parameters_; }
  [[nodiscard]] const UnitParameters& parameters() const { return parameters_; }
  [[nodiscard]] UnitGradients& gradients() { return gradients_; }
  [[nodiscard]] const UnitGradients& gradients() const { return gradients_; }
  [[nodiscard]] UnitSettings& settings() { return settings_; }
  [[nodiscard]] const UnitSettings& settings() const { return settings_; }
  [[nodiscard]] const UnitCommunicators& communicators() const { return communicators_; }
  [[nodiscard]] int num_nodes() const { return communicators_.gather.num_nodes(); }

  // Modules other than the unit's own use its full parameters: they are kept for the whole of the
  // outermost forward.
  void set_lent() { is_lent_ = true; }
  [[nodiscard]] bool is_lent() const { return is_lent_; }

  // --- what it needs of RuntimeMemory ---
  // Hop 2 of gathers reads a block and not the shard: several nodes, or the dtype changes on the
  // way to other ranks.
  [[nodiscard]] bool has_block() const;
  [[nodiscard]] int64_t block_nbytes() const;
  // It has memory of its own for its full parameters: it rests unsharded, or is in use while
  // others are.
  [[nodiscard]] bool keeps_full() const;
  // It has memory of its own for its node block.
  [[nodiscard]] bool keeps_block() const;
  // A partition group of one: the shard is cast straight into the full parameters.
  [[nodiscard]] bool is_whole() const { return parameters_.layout().partition_size() == 1; }
  // Its full gradients are added straight to their sum: nothing moves, and no rounding to the
  // reduce dtype is left out.
  [[nodiscard]] bool sums_in_place() const;
  // Elements of full gradients that cannot be reduced where autograd leaves them.
  [[nodiscard]] int64_t packed_numel() const;
  // Hop 2 of reductions runs at the boundary only.
  [[nodiscard]] bool accumulates_block() const;

 private:
  const UnitCommunicators communicators_;
  const bool has_nested_units_;
  UnitParameters parameters_;
  UnitGradients gradients_;
  UnitSettings settings_;
  bool is_lent_ = false;
};

// The communicators of the units' hops, each once, in an order that is the same on all ranks.
[[nodiscard]] std::vector<Communicator*> hop_communicators(
    const std::vector<std::shared_ptr<Unit>>& units);

// A backward has run that was no boundary, and no boundary since. The same on every rank.
[[nodiscard]] bool is_any_accumulating(const std::vector<std::shared_ptr<Unit>>& units);

// Names of units that have gradients which are not visible.
[[nodiscard]] std::vector<std::string> unfinished_units(
    const std::vector<std::shared_ptr<Unit>>& units);

// Bytes of memory for sums of gradients that was not planned.
[[nodiscard]] int64_t unplanned_sum_nbytes(const std::vector<std::shared_ptr<Unit>>& units);

// UnitParameters::matches_requires_grad() of all units.
[[nodiscard]] bool match_requires_grad(const std::vector<std::shared_ptr<Unit>>& units);

}  // namespace mics
