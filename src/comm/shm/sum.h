// The sum of a collective, over plain memory: as sum_in_order(), without tensors in between.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace mics::shm {

// Writes the sum of `pieces`, in their order, to `output`: accumulated in
// accumulation_dtype(dtype), rounded once. Each has `nbytes` bytes, whole elements, aligned to the
// element. `output` may be the memory of one of the pieces.
void sum_spans(c10::ScalarType dtype, char* output, const std::vector<const char*>& pieces,
               int64_t nbytes);

}  // namespace mics::shm
