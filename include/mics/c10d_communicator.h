// A communicator over any c10d ProcessGroup that has _allgather_base and alltoall_base (Gloo does).
//
// Gloo's own reduce-scatter is a full all-reduce inside wait(), twice the bytes. This one sends
// each piece to its owner by one all-to-all and sums there, in rank order, in fp32.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <memory>

#include "mics/communicator.h"

namespace c10d {
class ProcessGroup;
}

namespace mics {

// `process_group` has the members of `group` in the same order. It is held until the communicator
// is destroyed; all its users together make the same sequence of calls on every member. `timeout` is
// that of one operation. Must not be called, nor must operations run, with the GIL held. Throws
// InvalidArgument when size or rank differ between the two.
[[nodiscard]] std::unique_ptr<Communicator> make_c10d_communicator(
    GroupInfo group, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
    std::chrono::milliseconds timeout);

}  // namespace mics
