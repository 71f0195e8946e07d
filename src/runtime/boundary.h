// Boundary: the end of an accumulation, where gradients become visible.
//
//   1. hop 2, or the sum over replicas, of units that only earlier micro-steps have touched
//   2. all ranks agree on which parameters had a gradient anywhere, and on the order of the step
//   3. synchronized gradients are published into `.grad`; then torch's hooks of parameters run
//
// Order: compute waits for the reductions of all these units before 3.
//
// Thread safety: one thread at a time. Source: MiCS paper section 3.4; docs/design.md 10, 11.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "mics/runtime_streams.h"
#include "mics/unit.h"
#include "runtime/boundary_agreement.h"
#include "runtime/gather_pipeline.h"
#include "runtime/reduce_pipeline.h"
#include "runtime/step_digest.h"

namespace mics {

class Boundary {
 public:
  // All outlive it. `control`: see BoundaryAgreement.
  Boundary(const std::vector<std::shared_ptr<Unit>>& units, Communicator* control,
           RuntimeStreams& streams, StepDigest& digest, GatherPipeline& gathers,
           ReducePipeline& reduces);

  // Of the units that are at a boundary; nothing when none has a gradient. `flags`: see
  // BoundaryAgreement. `check_hooks` runs before anything becomes visible; what it throws leaves
  // gradients synchronized. Throws what reductions and hooks threw, and CommError when ranks ran
  // different steps.
  void synchronize(const at::Tensor& flags, const std::function<void()>& check_hooks);

  [[nodiscard]] BoundaryAgreement& agreement() { return agreement_; }

 private:
  [[nodiscard]] Unit& unit(int index) { return *units_[static_cast<size_t>(index)]; }
  // `used` has one flag for each trainable parameter of the `finished` units.
  void publish(const std::vector<int>& finished, const std::vector<bool>& used);

  const std::vector<std::shared_ptr<Unit>>& units_;
  GatherPipeline& gathers_;
  ReducePipeline& reduces_;
  BoundaryAgreement agreement_;
};

}  // namespace mics
