// Identity of a process, and whether it still runs. The system uses process ids again, so the
// identity includes the time at which the process started.
#pragma once

#include <cstdint>
#include <string>

namespace mics::shm {

struct ProcessId {
  int32_t pid = 0;
  uint64_t start_time = 0;  // in clock ticks since boot; 0: unknown
  friend bool operator==(const ProcessId&, const ProcessId&) = default;
};

[[nodiscard]] ProcessId this_process();

// False when the process has ended, is a zombie, or its id belongs to a later process. True when
// its start time is unknown. Only for processes of the same PID namespace.
[[nodiscard]] bool is_running(const ProcessId& process);

// Tells PID namespaces apart: within one, a process id means one process.
[[nodiscard]] uint64_t pid_namespace();

// The host's boot; "unknown" without /proc.
[[nodiscard]] std::string boot_id();

}  // namespace mics::shm
