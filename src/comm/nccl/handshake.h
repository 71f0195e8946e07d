// What the ranks of a world tell each other through the Store before NCCL is asked for anything.
#pragma once

#include <chrono>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "mics/nccl_options.h"

namespace mics {

// "2.28.9".
[[nodiscard]] std::string version_text(int version);
// "registration=none copy_engine=0 ...": what must be the same on all ranks.
[[nodiscard]] std::string settings_text(const NcclOptions& options);
// "[0 1 4]".
[[nodiscard]] std::string ranks_text(const std::vector<int>& ranks);

// Waits for the keys "topic/rank" of all `ranks`, and gives their values. Throws TimeoutError that
// names the ranks whose keys are missing.
[[nodiscard]] std::vector<std::string> wait_for_all(c10d::Store& store, const std::string& topic,
                                                    const std::vector<int>& ranks, int world_rank,
                                                    std::chrono::milliseconds timeout);

// Collective. Throws InvalidArgument on all ranks alike, before NCCL would fail or hang: versions or
// settings differ, or two ranks have one device. `bus_id`: of this rank's device.
void exchange_hellos(c10d::Store& store, const NcclOptions& options, int version,
                     const std::string& bus_id);

}  // namespace mics
