// What a user may set of NcclWorld.
#pragma once

#include <chrono>
#include <string>

namespace mics {

// What NCCL may do with the memory that the runtime works in. None of it is on by default until it
// has been measured.
enum class NcclRegistration {
  kNone,
  kBuffers,  // ncclCommRegister: NCCL reads and writes it in place where its transport can
  kWindows,  // symmetric windows: its symmetric kernels and copy engines can be used
};

struct NcclOptions {
  int rank = 0;
  int world_size = 1;
  int device = 0;    // CUDA's index on this host
  std::string host;  // names the node; ranks of one node give the same
  // From when its stream reaches an operation until it is done.
  std::chrono::milliseconds timeout{std::chrono::minutes(10)};
  // From its launch until its stream reaches it, not counting the operations before it: compute on
  // the stream may take long.
  std::chrono::milliseconds start_timeout{std::chrono::minutes(20)};
  // Of the rendezvous in create() and make_communicator().
  std::chrono::milliseconds init_timeout{std::chrono::minutes(10)};
  std::chrono::milliseconds watch_interval{100};
  // How long an abort waits for a launch of another thread that is inside NCCL. After that only the
  // abort can end it.
  std::chrono::milliseconds launch_patience{std::chrono::seconds(5)};
  int max_in_flight = 4;  // operations over the communicators of one direction; 0: no limit
  int max_ctas = 0;       // of each communicator's kernels; 0: NCCL's choice
  NcclRegistration registration = NcclRegistration::kNone;  // the same on all ranks
  // Gathers inside a node may go to copy engines, which leaves all SMs to compute. With windows;
  // the same on all ranks.
  bool copy_engine = false;
  // False: NCCL's non-blocking mode; the same on all ranks. A start ends at init_timeout when a peer
  // is gone that has taken part in the exchange through the Store before it; in blocking mode only
  // NCCL's own time-outs end it. True is the default all the same, because the mode is a
  // communicator's for life: NCCL 2.28 makes a thread for each group of calls of a non-blocking one,
  // and the launching thread polls until it has ended, in every launch of every step.
  bool is_blocking = true;
};

}  // namespace mics
