#include "comm/shm/process.h"

#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <iterator>
#include <sstream>

namespace mics::shm {

namespace {

// State and start time of /proc/<pid>/stat. The name before them is in parentheses and may hold
// anything, parentheses too.
bool read_stat(int32_t pid, char& state, uint64_t& start_time) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  const std::string text((std::istreambuf_iterator<char>(file)), {});
  const size_t name_end = text.rfind(')');
  if (name_end == std::string::npos) return false;
  std::istringstream fields(text.substr(name_end + 1));
  fields >> state;  // field 3
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  return static_cast<bool>(fields >> start_time);
}

}  // namespace

ProcessId this_process() {
  ProcessId process{static_cast<int32_t>(getpid()), 0};
  char state = '?';
  if (!read_stat(process.pid, state, process.start_time)) process.start_time = 0;
  return process;
}

bool is_running(const ProcessId& process) {
  if (process.start_time == 0) return true;
  char state = '?';
  uint64_t start_time = 0;
  if (!read_stat(process.pid, state, start_time)) return false;
  const bool has_ended = state == 'Z' || state == 'X' || state == 'x';
  return !has_ended && start_time == process.start_time;
}

uint64_t pid_namespace() {
  struct stat info{};
  return stat("/proc/self/ns/pid", &info) == 0 ? static_cast<uint64_t>(info.st_ino) : 0;
}

std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  return file >> text ? text : "unknown";
}

}  // namespace mics::shm
