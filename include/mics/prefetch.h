// What a training program may set of prefetching. The same on every rank.
#pragma once

namespace mics {

// When units are used: a forward, or a backward.
enum class Phase { kForward, kBackward };

// How far the runtime works ahead of the module. More depth hides more communication and takes more
// memory: RuntimeMemory has intra + 1 full slots and rail - intra + 1 block slots.
struct Depths {
  int intra = 1;       // units whose hop 2 is prefetched; at least 0
  int rail = 2;        // units whose hop 1 is prefetched; at least `intra`
  int reductions = 2;  // in flight at a time; at least 1
};

// Throws InvalidArgument when a depth is out of its range.
void check_depths(const Depths& depths);

}  // namespace mics
