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
  int max_in_flight = 4;  // operations over all communicators; 0: no limit
  int max_ctas = 0;       // of each communicator's kernels; 0: NCCL's choice
  NcclRegistration registration = NcclRegistration::kNone;  // the same on all ranks
  // Gathers inside a node may go to copy engines, which leaves all SMs to compute. With windows;
  // the same on all ranks.
  bool copy_engine = false;
  bool is_blocking = true;  // false: NCCL's non-blocking mode, whose start can time out
};

}  // namespace mics
