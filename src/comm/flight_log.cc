#include "mics/flight_log.h"

#include <algorithm>
#include <sstream>
#include <utility>

#include "plan/check.h"

namespace mics {

FlightLog::FlightLog(size_t capacity) : ring_(capacity) {
  MICS_CHECK(capacity >= 1,
             "a flight log must hold at least one operation: got capacity=", capacity, ".");
}

int64_t FlightLog::issue(std::string_view group, std::string_view op, std::string_view unit,
                         int64_t nbytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  auto found = index_of_group_.find(group);
  if (found == index_of_group_.end()) {
    found = index_of_group_.emplace(group, groups_.size()).first;
    groups_.push_back({std::string(group)});
  }
  Group& in = groups_[found->second];
  const int64_t id = num_operations_++;
  LoggedOperation& entry = ring_[static_cast<size_t>(id) % ring_.size()];
  entry.id = id;
  entry.number = ++in.num_issued;
  entry.group.assign(group);
  entry.op.assign(op);
  entry.unit.assign(unit);
  entry.nbytes = nbytes;
  entry.state = LoggedOperation::State::kIssued;
  entry.issued_at = std::chrono::steady_clock::now();
  return id;
}

LoggedOperation* FlightLog::find(int64_t id) {
  LoggedOperation& entry = ring_[static_cast<size_t>(id) % ring_.size()];
  return entry.id == id ? &entry : nullptr;
}

void FlightLog::start(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (LoggedOperation* entry = find(id)) {
    entry->state = LoggedOperation::State::kStarted;
    entry->started_at = std::chrono::steady_clock::now();
  }
}

void FlightLog::finish(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  LoggedOperation* entry = find(id);
  if (entry == nullptr) return;
  entry->state = LoggedOperation::State::kFinished;
  entry->ended_at = std::chrono::steady_clock::now();
  Group& in = groups_[index_of_group_.find(entry->group)->second];
  in.num_finished = std::max(in.num_finished, entry->number);
}

void FlightLog::fail(int64_t id) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (LoggedOperation* entry = find(id)) {
    entry->state = LoggedOperation::State::kFailed;
    entry->ended_at = std::chrono::steady_clock::now();
  }
}

std::vector<LoggedOperation> FlightLog::operations() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<LoggedOperation> found;
  const auto capacity = static_cast<int64_t>(ring_.size());
  for (int64_t id = std::max<int64_t>(0, num_operations_ - capacity); id < num_operations_; ++id) {
    found.push_back(ring_[static_cast<size_t>(id % capacity)]);
  }
  return found;
}

std::vector<GroupProgress> FlightLog::progress() const {
  const std::vector<LoggedOperation> logged = operations();
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<GroupProgress> found;
  for (const Group& group : groups_) {
    GroupProgress progress{group.name, group.num_issued, group.num_finished, {}};
    for (const LoggedOperation& operation : logged) {
      if (operation.group != group.name || operation.number != group.num_finished + 1) continue;
      std::ostringstream text;
      text << operation.op;
      if (!operation.unit.empty()) text << " of unit \"" << operation.unit << '"';
      text << ", " << operation.nbytes << " bytes";
      progress.current = text.str();
    }
    found.push_back(std::move(progress));
  }
  return found;
}

void FlightLog::set_reporter(std::function<std::string(const FlightLog&)> reporter) {
  const std::lock_guard<std::mutex> lock(report_mutex_);
  reporter_ = std::move(reporter);
  report_.reset();
}

std::string FlightLog::report_failure() {
  const std::lock_guard<std::mutex> lock(report_mutex_);
  if (!report_) report_ = reporter_ ? reporter_(*this) : describe_ranks({progress()});
  return *report_;
}

void FlightLog::begin_incident() {
  const std::lock_guard<std::mutex> lock(report_mutex_);
  report_.reset();
  ++incident_;
}

std::string encode_progress(const std::vector<GroupProgress>& progress) {
  std::ostringstream text;
  for (const GroupProgress& group : progress) {
    text << group.group << '\t' << group.num_issued << '\t' << group.num_finished << '\t'
         << group.current << '\n';
  }
  return text.str();
}

std::vector<GroupProgress> decode_progress(const std::string& text) {
  std::vector<GroupProgress> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    std::istringstream fields(line);
    GroupProgress progress;
    std::string issued, finished;
    std::getline(fields, progress.group, '\t');
    std::getline(fields, issued, '\t');
    std::getline(fields, finished, '\t');
    std::getline(fields, progress.current, '\t');
    progress.num_issued = std::stoll(issued);
    progress.num_finished = std::stoll(finished);
    found.push_back(std::move(progress));
  }
  return found;
}

namespace {

const GroupProgress* find_group(const std::vector<GroupProgress>& progress,
                                const std::string& group) {
  const auto found =
      std::find_if(progress.begin(), progress.end(),
                   [&](const GroupProgress& candidate) { return candidate.group == group; });
  return found == progress.end() ? nullptr : &*found;
}

}  // namespace

std::string describe_ranks(const std::vector<std::optional<std::vector<GroupProgress>>>& ranks) {
  // For each group, the furthest operation that any rank has issued.
  std::map<std::string, int64_t> furthest;
  std::map<std::string, bool> is_under_way;
  for (const auto& rank : ranks) {
    if (!rank) continue;
    for (const GroupProgress& group : *rank) {
      furthest[group.group] = std::max(furthest[group.group], group.num_issued);
      if (!group.current.empty()) is_under_way[group.group] = true;
    }
  }
  std::ostringstream text;
  text << "What each rank was doing (operations of a group count from 1):";
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    text << "\n  world_rank " << rank << ": ";
    if (!ranks[rank]) {
      text << "no answer; it has ended or is stopped";
      continue;
    }
    bool has_line = false;
    for (const auto& [name, last] : furthest) {
      const GroupProgress* group = find_group(*ranks[rank], name);
      if (group == nullptr || !is_under_way[name]) continue;
      text << (has_line ? "; " : "") << name << ": ";
      has_line = true;
      if (!group->current.empty()) {
        text << "in operation " << group->num_finished + 1 << ", " << group->current;
      } else {
        text << group->num_finished << " finished, none issued";
      }
      if (group->num_issued < last) text << ", behind (others have issued " << last << ")";
    }
    if (!has_line) text << "in no collective";
  }
  return text.str();
}

}  // namespace mics
