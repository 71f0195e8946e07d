// Segment: the shared memory of one group, mapped by each member.
//
//   | Header | Member 0 | ... | Member n-1 | padding to a page | slot 0 | ... | slot n-1 |
//
// Invariants:
//  1. The creator fills the header before it sets is_ready; sizes and group never change after.
//  2. A member writes its own Member and its own slot only; and, once, the failure.
//  3. Half h of a slot and announcement h hold the data of rounds r with r % 2 == h. The owner
//     writes them for round r and then sets `written` to r. When all members have written round
//     r - 1 they have read round r - 2, so nobody reads what it overwrites.
//  4. The name is gone when all members have attached.
//
// Thread safety: one thread at a time per Segment object.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

#include "comm/shm/counter.h"
#include "comm/shm/process.h"

namespace mics::shm {

// What a member is about to do. The members of a round must announce the same.
struct Announcement {
  int64_t operation = 0;  // number of the operation on this communicator
  int32_t kind = 0;       // OperationKind
  int32_t dtype = 0;      // at::ScalarType
  int64_t num_pairs = 0;
  int64_t nbytes = 0;      // of one member's piece
  uint64_t sizes_key = 0;  // of the pairs' sizes, in order
  friend bool operator==(const Announcement&, const Announcement&) = default;
};

struct alignas(kCacheLine) Member {
  enum State : uint32_t { kAbsent, kAttaching, kAttached, kLeft };
  std::atomic<uint32_t> state{kAbsent};
  ProcessId process;  // written before kAttached
  Counter written;    // the last round that this member has put into its slot, all earlier read
  struct alignas(kCacheLine) Half {
    Announcement announcement;
  } halves[2];
};

// The first failure of the group; all members report it.
struct alignas(kCacheLine) Failure {
  enum State : uint32_t { kNone, kBeingWritten, kComm, kTimeout };
  std::atomic<uint32_t> state{kNone};
  char reason[380] = {};  // written before kComm or kTimeout; ends in a zero
};

struct alignas(kCacheLine) Header {
  uint64_t magic = 0;
  uint32_t version = 0;
  int32_t size = 0;  // members
  int64_t slot_nbytes = 0;
  uint64_t group_key = 0;  // of the group's name and members
  std::atomic<uint32_t> is_ready{0};
  alignas(kCacheLine) std::atomic<int32_t> num_attached{0};
  Failure failure;
};

class Segment {
 public:
  // Makes the segment and attaches `rank`. Throws InvalidArgument for an illegal name or slot,
  // CommError when the system refuses.
  [[nodiscard]] static Segment create(const std::string& name, uint64_t group_key, int size,
                                      int rank, int64_t slot_nbytes);
  // Attaches `rank`. Waits for the creator. Throws as ShmGroup().
  [[nodiscard]] static Segment attach(const std::string& name, uint64_t group_key, int size,
                                      int rank, std::chrono::milliseconds timeout);

  Segment(Segment&& other) noexcept;
  Segment& operator=(Segment&&) = delete;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  // Marks this member as left, wakes those that wait for it, and unmaps.
  ~Segment();

  [[nodiscard]] int64_t slot_nbytes() const { return header().slot_nbytes; }
  [[nodiscard]] Member& member(int rank) const;
  [[nodiscard]] Member& own() const { return member(rank_); }
  // Wakes every member that waits for a counter, so that it sees a failure.
  void wake_everybody() const;
  [[nodiscard]] char* slot(int rank) const;
  [[nodiscard]] Failure& failure() const { return header().failure; }
  // Removes the name if it is still there.
  void unlink_unless_complete();

 private:
  Segment(std::string name, int rank, void* memory, size_t nbytes);
  [[nodiscard]] Header& header() const { return *static_cast<Header*>(memory_); }
  // Takes this member's place; the last one to come removes the name.
  void take_place();

  std::string name_;
  int rank_;
  int32_t pid_;   // a forked child must not leave in its parent's name
  void* memory_;  // null: moved from
  size_t nbytes_;
  bool has_place_ = false;  // false when the constructor's caller fails: then nobody has left
};

}  // namespace mics::shm
