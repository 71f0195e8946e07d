// Residency: what of a unit's gathered parameters stays in memory between two uses.
#pragma once

namespace mics {

enum class Residency {
  kShard,  // the shard only: both hops run again
  kBlock,  // the node block (hop 1's result): only hop 2 runs again
  kFull,   // everything: nothing runs again
};

// How a unit rests. Weights do not change between the micro-steps of a step, so what is kept is
// right until the optimizer step.
struct ResidencySettings {
  Residency after_forward = Residency::kShard;          // until backward needs it
  Residency between_microsteps = Residency::kShard;     // until the next forward
  Residency gradient_accumulation = Residency::kShard;  // what hop 1 of reduce is summed into
};

}  // namespace mics
