// LocalWorld: ranks as threads of one process. The reference that other backends are compared with.
//
// A member reads its peers' tensors directly, so an operation costs no copy beyond the transfer.
// The inputs of a member must not be written until its own call has returned (inline stream) or its
// work is done (other streams): every operation ends with a barrier.
//
//   LocalWorld world(4, std::chrono::seconds(60));
//   // on the thread of each rank:
//   auto communicator = world.make_communicator(group);
//   communicator->all_gather(output, input, stream);
#pragma once

#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "mics/communicator.h"

namespace mics {

class LocalMeetingPoint;

// Outlives the communicators that it makes. Thread-safe.
class LocalWorld {
 public:
  // `timeout`: how long a member waits for the others before TimeoutError.
  LocalWorld(int world_size, std::chrono::milliseconds timeout);
  ~LocalWorld();

  // Called by each member of the group on its own thread. Members find each other by `group.name` and ranks.
  [[nodiscard]] std::unique_ptr<Communicator> make_communicator(GroupInfo group);

 private:
  const int world_size_;
  const std::chrono::milliseconds timeout_;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<LocalMeetingPoint>> meeting_points_;  // guarded by mutex_
};

}  // namespace mics
