// Reports of a failure: through the Store, each rank publishes its progress when one of them fails.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <memory>

#include "mics/flight_log.h"

namespace c10d {
class Store;
}

namespace mics {

// A log whose report is a table of all ranks. A thread of the log polls the Store every
// `interval`; when some rank has failed it publishes this rank's progress, so ranks that are in no
// collective answer too. The report waits at most `patience` for the others.
//
// `store` is that of this session alone (a PrefixStore), and is cloned, so that the log
// does not wait for the caller's calls. All ranks use the same prefix.
[[nodiscard]] std::shared_ptr<FlightLog> make_reporting_log(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
    std::chrono::milliseconds interval, std::chrono::milliseconds patience);

}  // namespace mics
