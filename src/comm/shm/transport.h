// Transport: rounds of a group over its segment, and the failure that all members see.
//
// In a round each member fills its own half-slot, waits until all others have filled theirs, and
// reads those. A message longer than a half takes several rounds, in alternating halves.
//
// After an error every later operation fails, on every member.
//
// Thread safety: one thread at a time; has_failed() at any time.
#pragma once

#include <c10/core/ScalarType.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "comm/shm/byte_stream.h"
#include "comm/shm/segment.h"
#include "mics/communicator.h"

namespace mics::shm {

enum OperationKind : int32_t { kAllGather, kReduceScatter, kAllReduce, kBarrier };

class Transport {
 public:
  Transport(GroupInfo group, Segment segment, std::chrono::milliseconds timeout);

  [[nodiscard]] const GroupInfo& group() const { return group_; }
  [[nodiscard]] bool has_failed() const;

  // Starts an operation; its time runs from here. `announcement` is without the number, which is
  // given here. Then any sequence of the three below, the same on every member. Each throws
  // CommError when a member ended or announced another operation, TimeoutError when one does not
  // come.
  void begin(const Announcement& announcement);
  // outputs[r] gets what member r has in `input`; the own place is filled already.
  void gather(ByteStream input, std::vector<ByteStream> outputs);
  // Sums the members' inputs[rank], in ascending rank order, to `output`.
  void reduce(std::vector<ByteStream> inputs, ByteStream output, c10::ScalarType dtype);
  // Returns when every member has called it.
  void meet();

 private:
  [[nodiscard]] char* half_of(int member) const;
  [[nodiscard]] int world_rank(int member) const;
  [[nodiscard]] std::string describe(const Announcement& announcement, int member) const;
  // `write` fills this member's half; `read` reads the halves of all others.
  void run_round(const std::function<void(char*)>& write, const std::function<void()>& read);
  void check_same(int member);
  void wait_for(int member, Counter& counter, uint32_t target);
  // Lets every member fail with `reason`, unless another failure came first, and throws.
  [[noreturn]] void fail(Failure::State kind, const std::string& reason);
  void throw_if_failed() const;
  [[noreturn]] void throw_failure(Failure::State kind, const std::string& reason) const;

  const GroupInfo group_;
  Segment segment_;
  const std::chrono::milliseconds timeout_;
  const int64_t half_nbytes_;
  const int num_spins_;
  uint32_t round_ = 0;
  int64_t operation_ = 0;
  // Of the operation that runs.
  Announcement announcement_;
  std::chrono::steady_clock::time_point deadline_;
};

}  // namespace mics::shm
