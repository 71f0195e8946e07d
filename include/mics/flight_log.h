// FlightLog: the last collectives of a rank and how far each group has come; what a failure
// reports.
//
//   issue(...)  on the thread that decides the order      -> the operation's id
//   start(id)   where it runs
//   finish(id) or fail(id)
//
// A group is a communicator: its operations run in the order of issue, so the numbers of issued and
// finished ones are its progress. The log holds the last `capacity` operations. It allocates only
// for names that it has not seen before.
//
// Thread safety: any thread.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace mics {

struct LoggedOperation {
  enum class State { kIssued, kStarted, kFinished, kFailed };
  int64_t id = 0;      // over all groups, from 0
  int64_t number = 0;  // in its group, from 1
  std::string group;   // "gather/rail [0 2]"
  std::string op;      // "all_gather"
  std::string unit;    // empty: no unit's
  int64_t nbytes = 0;  // of the larger side
  State state = State::kIssued;
  std::chrono::steady_clock::time_point issued_at, started_at, ended_at;
};

// How far one rank has come in one group.
struct GroupProgress {
  std::string group;
  int64_t num_issued = 0;
  int64_t num_finished = 0;
  std::string current;  // the operation after the last finished one; empty: none is issued
  bool operator==(const GroupProgress&) const = default;
};

class FlightLog {
 public:
  explicit FlightLog(size_t capacity = 256);
  FlightLog(const FlightLog&) = delete;
  FlightLog& operator=(const FlightLog&) = delete;

  [[nodiscard]] int64_t issue(std::string_view group, std::string_view op, std::string_view unit,
                              int64_t nbytes);
  void start(int64_t id);
  void finish(int64_t id);
  void fail(int64_t id);

  // Oldest first.
  [[nodiscard]] std::vector<LoggedOperation> operations() const;
  // In the order in which groups were first used.
  [[nodiscard]] std::vector<GroupProgress> progress() const;

  // Called once per incident, by the first operation that fails, where it runs: gives what is known
  // of all ranks. Later failures of the incident get the same text.
  void set_reporter(std::function<std::string(const FlightLog&)> reporter);
  [[nodiscard]] std::string report_failure();
  // Ends an incident: the next failure gets a new report. Incidents are told apart by their number,
  // so all ranks call this equally often.
  void begin_incident();
  [[nodiscard]] int64_t incident() const { return incident_; }

 private:
  struct Group {
    std::string name;
    int64_t num_issued = 0;
    int64_t num_finished = 0;
  };
  // Null when the ring has overwritten it.
  [[nodiscard]] LoggedOperation* find(int64_t id);

  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::vector<LoggedOperation> ring_;  // operation `id` lies at id % capacity
  int64_t num_operations_ = 0;
  std::vector<Group> groups_;
  std::map<std::string, size_t, std::less<>> index_of_group_;

  std::atomic<int64_t> incident_{0};
  std::mutex report_mutex_;
  // Guarded by report_mutex_.
  std::function<std::string(const FlightLog&)> reporter_;
  std::optional<std::string> report_;
};

// One rank's progress as text, and back; for the Store.
[[nodiscard]] std::string encode_progress(const std::vector<GroupProgress>& progress);
[[nodiscard]] std::vector<GroupProgress> decode_progress(const std::string& text);

// What each rank waits for, and who is behind. `ranks[r]` is nullopt when rank r has not answered.
// Groups without an operation in flight on any rank are left out.
[[nodiscard]] std::string describe_ranks(
    const std::vector<std::optional<std::vector<GroupProgress>>>& ranks);

}  // namespace mics
