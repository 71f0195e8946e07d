// RaceChecker: whether what streams do to memory is ordered by events alone.
//
// A trace lists what was asked of streams, in the order in which the host asked. Each access gets a
// time of its stream, and each stream a vector clock: the times of all streams up to which it is
// ordered. A record keeps the clock of its stream, a wait takes it over. Two accesses to the same
// bytes by two streams, at least one of them a write, must be ordered; else it is a race, whatever
// the timing of this run was.
//
// The order in which the host asks orders nothing, but where the host itself has waited.
//
// Cost: a step in an ordered map for each piece of memory that an access meets. Memory: one entry
// for each range of bytes that was accessed alike and not freed.
//
// Thread safety: one thread at a time. Source: issue 18, section 4.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <vector>

namespace mics {

struct RaceEntry {
  // kForget: the bytes belong to something new, in an order that is known to be right.
  enum class Kind { kRead, kWrite, kFree, kForget, kRecord, kWait, kHostWait };
  Kind kind = Kind::kRead;
  int stream = 0;      // of a free: the one in whose order the memory is given out again
  int operation = 0;   // of an access; the caller's number for its name
  uint64_t first = 0;  // bytes [first, last) of an access
  uint64_t last = 0;
  // Of a record: its number; of a wait: of the record, -1: never recorded. Of a host's wait: -1: it
  // is for the stream.
  int mark = -1;
  int before = -1;  // of a record: what the event was marked with until now
};

struct Race {
  RaceEntry now;
  RaceEntry past;  // its bytes are those of the overlap
};

class RaceChecker {
 public:
  // The next entry of the trace. Returns the race with an earlier entry, if there is one.
  std::optional<Race> add(const RaceEntry& entry);

 private:
  using Clock = std::vector<int64_t>;  // by stream
  struct Past {
    int stream = 0;
    int operation = 0;
    int64_t time = 0;
  };
  // Bytes that were accessed alike.
  struct Piece {
    uint64_t last = 0;
    std::optional<Past> write;
    std::vector<Past> reads;  // since the write; the last one of each stream
  };
  using Pieces = std::map<uint64_t, Piece>;  // by first byte

  [[nodiscard]] Clock& clock_of(int stream);
  static void join(Clock& clock, const Clock& other);
  [[nodiscard]] bool is_ordered(const Past& past, int stream) const;
  // Makes pieces begin or end at `byte`.
  void split(uint64_t byte);
  [[nodiscard]] std::optional<Race> find_race(const RaceEntry& entry) const;
  void note_read(const RaceEntry& entry, const Past& past);

  std::vector<Clock> clocks_;
  Clock host_;
  std::map<int, Clock> marks_;
  Pieces pieces_;
};

}  // namespace mics
