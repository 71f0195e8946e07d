// Communicators for CPU ranks of one host, over one POSIX shared memory segment per group.
//
// A sender copies what it sends into its own slot of the segment; the receivers read it there. A
// message longer than half a slot goes through in pieces, two at a time, so that a sender fills one
// half while its peers read the other. A sum reads the peers' slots directly, in ascending rank
// order: the bits are those of every other backend.
//
//   member 0 creates the segment, the others attach; the last to attach removes its name, so that
//   nothing is left in /dev/shm whatever happens later.
//
// A peer that has ended gives a CommError within about a tenth of a second; one that is stopped, or
// in another call, a TimeoutError. Both name the peer's world rank. After an error every member
// fails, and so does every later call.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "mics/communicator.h"

namespace mics {

// With it a group takes 1 MiB of /dev/shm per member, and less than 1 KiB beside.
inline constexpr int64_t kDefaultShmSlotNbytes = int64_t{1} << 20;

struct ShmOptions {
  std::string segment;   // a name that no other group uses; see make_shm_segment_name()
  bool creates = false;  // exactly one member creates the segment; the others attach
  // Of each member's slot, a multiple of 128 bytes per member. Attaching members take the
  // creator's.
  int64_t slot_nbytes = kDefaultShmSlotNbytes;
  std::chrono::milliseconds timeout{0};  // of one operation, and of waiting for the creator
};

namespace shm {
class Transport;
}

// One member's place in a group's segment.
//
// All communicators made from it share one order: they are used on one stream, by one thread at a
// time, in the same order on every member. Each counts its own traffic.
class ShmGroup {
 public:
  // Creates or attaches to the segment of `group`. The creator does not wait for the others; a
  // member that attaches waits for the creator. Tensors must be on the CPU.
  //
  // Throws InvalidArgument when the name or sizes are not legal, the segment is another group's or
  // this member's place is taken; CommError when the system refuses (no space in /dev/shm, no
  // permission); TimeoutError when the creator has not made it in time.
  ShmGroup(GroupInfo group, const ShmOptions& options);
  ~ShmGroup();  // the place is free once the communicators are destroyed too
  ShmGroup(const ShmGroup&) = delete;
  ShmGroup& operator=(const ShmGroup&) = delete;

  [[nodiscard]] std::unique_ptr<Communicator> make_communicator() const;
  // An operation has failed, so all later ones do. Members see it at different times.
  [[nodiscard]] bool has_failed() const;

 private:
  std::shared_ptr<shm::Transport> transport_;
};

// A name that is new on this host and tells which process made it. Thread-safe.
[[nodiscard]] std::string make_shm_segment_name();

// Removes segments made under such names by processes that have ended, and returns how many. Those
// are what a crash between the creation and the last attach leaves. Only processes of this
// process's PID namespace are looked at.
int remove_stale_shm_segments();

// Names the host as shared memory and process ids see it: processes with the same identity can
// share a segment and watch each other.
[[nodiscard]] std::string shm_host_identity();

}  // namespace mics
