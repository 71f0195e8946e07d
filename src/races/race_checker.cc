#include "races/race_checker.h"

#include <algorithm>
#include <utility>

namespace mics {

RaceChecker::Clock& RaceChecker::clock_of(int stream) {
  const auto index = static_cast<size_t>(stream);
  if (clocks_.size() <= index) clocks_.resize(index + 1);
  Clock& clock = clocks_[index];
  if (clock.size() <= index) clock.resize(index + 1, 0);
  return clock;
}

void RaceChecker::join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size(), 0);
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

bool RaceChecker::is_ordered(const Past& past, int stream) const {
  if (past.stream == stream) return true;
  const auto index = static_cast<size_t>(past.stream);
  const auto reached = [&](const Clock& clock) {
    return index < clock.size() && clock[index] >= past.time;
  };
  return reached(clocks_[static_cast<size_t>(stream)]) || reached(host_);
}

void RaceChecker::split(uint64_t byte) {
  auto found = pieces_.upper_bound(byte);
  if (found == pieces_.begin()) return;
  --found;
  if (found->first == byte || found->second.last <= byte) return;
  Piece rest = found->second;
  found->second.last = byte;
  pieces_.emplace(byte, std::move(rest));
}

std::optional<Race> RaceChecker::find_race(const RaceEntry& entry) const {
  const bool is_read = entry.kind == RaceEntry::Kind::kRead;
  for (auto piece = pieces_.lower_bound(entry.first);
       piece != pieces_.end() && piece->first < entry.last; ++piece) {
    const auto race_with = [&](const Past& past, RaceEntry::Kind kind) {
      return Race{entry,
                  {kind, past.stream, past.operation, piece->first, piece->second.last, -1, -1}};
    };
    const std::optional<Past>& write = piece->second.write;
    if (write.has_value() && !is_ordered(*write, entry.stream)) {
      return race_with(*write, RaceEntry::Kind::kWrite);
    }
    if (is_read) continue;
    for (const Past& read : piece->second.reads) {
      if (!is_ordered(read, entry.stream)) return race_with(read, RaceEntry::Kind::kRead);
    }
  }
  return std::nullopt;
}

void RaceChecker::note_read(const RaceEntry& entry, const Past& past) {
  uint64_t byte = entry.first;
  auto piece = pieces_.lower_bound(byte);
  while (byte < entry.last) {
    if (piece == pieces_.end() || piece->first > byte) {  // bytes that nothing has accessed
      const uint64_t end = piece == pieces_.end() ? entry.last : std::min(entry.last, piece->first);
      piece = pieces_.emplace_hint(piece, byte, Piece{end, std::nullopt, {}});
    }
    std::vector<Past>& reads = piece->second.reads;
    const auto own = std::find_if(reads.begin(), reads.end(),
                                  [&](const Past& other) { return other.stream == past.stream; });
    if (own != reads.end()) {
      *own = past;
    } else {
      reads.push_back(past);
    }
    byte = piece->second.last;
    ++piece;
  }
}

std::optional<Race> RaceChecker::add(const RaceEntry& entry) {
  using enum RaceEntry::Kind;
  Clock& clock = clock_of(entry.stream);
  switch (entry.kind) {
    case kRecord:
      marks_[entry.mark] = clock;
      join(marks_[entry.mark], host_);
      return std::nullopt;
    case kWait:
      if (const auto mark = marks_.find(entry.mark); mark != marks_.end()) {
        join(clock, mark->second);
      }
      return std::nullopt;
    case kHostWait:
      if (entry.mark < 0) {
        join(host_, clock);
      } else if (const auto mark = marks_.find(entry.mark); mark != marks_.end()) {
        join(host_, mark->second);
      }
      return std::nullopt;
    case kRead:
    case kWrite:
    case kFree:
    case kForget:
      break;
  }
  if (entry.first >= entry.last) return std::nullopt;
  const int64_t time = ++clock[static_cast<size_t>(entry.stream)];
  split(entry.first);
  split(entry.last);
  const std::optional<Race> race = entry.kind == kForget ? std::nullopt : find_race(entry);
  const Past past = {entry.stream, entry.operation, time};
  if (entry.kind == kRead) {
    note_read(entry, past);
    return race;
  }
  // Whoever is ordered after this write is ordered after what it covers.
  pieces_.erase(pieces_.lower_bound(entry.first), pieces_.lower_bound(entry.last));
  if (entry.kind == kWrite) pieces_.emplace(entry.first, Piece{entry.last, past, {}});
  return race;
}

}  // namespace mics
