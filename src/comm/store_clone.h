// clone_store: a Store for one thread, with a time-out of its own.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <torch/csrc/distributed/c10d/Store.hpp>

namespace mics {

// Calls of the clone do not wait for those of other threads, and end after `timeout` (calls on a
// FileStore whose file is gone wait that long). `store` keeps its own time-out, even where the
// backend cannot clone and returns `store` itself.
[[nodiscard]] c10::intrusive_ptr<c10d::Store> clone_store(
    const c10::intrusive_ptr<c10d::Store>& store, std::chrono::milliseconds timeout);

}  // namespace mics
