#include "mics/prefetch.h"

#include "plan/check.h"

namespace mics {

void check_depths(const Depths& depths) {
  MICS_CHECK(depths.intra >= 0 && depths.rail >= depths.intra && depths.reductions >= 1,
             "prefetch depths must be 0 <= intra <= rail, and reductions at least 1: got intra=",
             depths.intra, ", rail=", depths.rail, ", reductions=", depths.reductions, ".");
}

}  // namespace mics
