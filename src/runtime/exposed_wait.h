// Waits of compute for a collective, measured and shown to torch.profiler.
#pragma once

#include <chrono>
#include <string>

#include "mics/stream.h"

namespace mics {

// compute.wait(event). How long the calling thread waited, by the clock of `compute`, is
// added to `exposed`: on CPUs the part of communication that compute does not hide; about nothing
// where the wait is a device's.
// A profiler sees the range "torch_mics: <what> of <unit>".
void wait_exposed(Stream& compute, const Event& event, const char* what, const std::string& unit,
                  std::chrono::nanoseconds& exposed);

}  // namespace mics
