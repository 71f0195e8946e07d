// RuntimeStreams: the streams of one rank's runtime.
//
//   compute        the caller's own; it waits for gathers and for synchronised gradients
//   gather_rail    hop 1 of gathers, and the control group's sums
//   gather_intra   hop 2 of gathers
//   reduce_intra   hop 1 of reductions         reduce_rail    hop 2 of reductions
//   replicate      all-reduces over replicas
//
// Every communicator is used on one of them only, so its operations run in the order of issue.
// Engines whose communicators share a transport share the streams too: the order of issue is then
// one order for all of them.
#pragma once

#include <memory>
#include <vector>

#include "mics/stream.h"

namespace mics {

struct RuntimeStreams {
  std::unique_ptr<Stream> compute;
  std::unique_ptr<Stream> gather_rail;
  std::unique_ptr<Stream> gather_intra;
  std::unique_ptr<Stream> reduce_intra;
  std::unique_ptr<Stream> reduce_rail;
  std::unique_ptr<Stream> replicate;
  // What the caller's thread frees is used again at once in the order of `compute`, as by a
  // device's caching allocator. Then gradients are freed by an edge to compute, and not when the
  // host sees that their reduction is over: it runs ahead of the device, and would hold those of
  // many units.
  bool frees_in_compute_order = false;
  // All but compute.
  [[nodiscard]] std::vector<Stream*> communication() const {
    return {gather_rail.get(), gather_intra.get(), reduce_intra.get(), reduce_rail.get(),
            replicate.get()};
  }
};

// Everything on the caller's thread, one operation after the other: for debugging, and for devices
// whose collectives go to the current stream.
[[nodiscard]] std::shared_ptr<RuntimeStreams> make_inline_streams();

// A thread per communication stream; compute is the caller's thread. The last owner must not hold
// the GIL: the threads are joined.
[[nodiscard]] std::shared_ptr<RuntimeStreams> make_worker_streams();

}  // namespace mics
