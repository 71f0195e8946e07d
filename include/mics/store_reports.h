// Through the Store, ranks tell each other how far they have come when one of them fails.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <memory>

#include "mics/flight_log.h"

namespace c10d {
class Store;
}

namespace mics {

// A log whose report is a table of all ranks. A thread of the log looks into the Store every
// `interval` whether some rank has failed, and then publishes this rank's progress, so ranks that
// are in no collective answer too. The report waits `patience` for the others at most.
//
// `store` is that of this session alone (a PrefixStore), and is cloned: the log's traffic does not
// wait for the caller's. All ranks make theirs with the same prefix.
[[nodiscard]] std::shared_ptr<FlightLog> make_reporting_log(
    const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
    std::chrono::milliseconds interval, std::chrono::milliseconds patience);

}  // namespace mics
