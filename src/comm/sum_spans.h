// The sum of a collective over plain memory of the host: one pass, no memory of its own.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

namespace mics {

// Writes the sum of `pieces`, in their order, to `output`: accumulated in
// accumulation_dtype(dtype), rounded once. Each has `nbytes` bytes, whole elements, aligned to the
// element. `output` may be the memory of one of the pieces.
void sum_spans(c10::ScalarType dtype, char* output, const std::vector<const char*>& pieces,
               int64_t nbytes);

}  // namespace mics
