// clone_store: a Store for one thread, with a time-out of its own.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace mics {

// Its calls wait for nobody else's, and end at `timeout`: those on the Store of a file that is gone
// wait so long. `store` keeps its own time-out, also where its clone is itself.
[[nodiscard]] c10::intrusive_ptr<c10d::Store> clone_store(
    const c10::intrusive_ptr<c10d::Store>& store, std::chrono::milliseconds timeout);

}  // namespace mics
