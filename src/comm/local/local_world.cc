#include "mics/local_world.h"

#include <ATen/ops/empty_like.h>

#include <condition_variable>
#include <sstream>
#include <string_view>
#include <utility>

#include "mics/error.h"
#include "plan/check.h"

namespace mics {

// What a member brings to an operation. `pairs` belongs to the caller of the operation.
struct LocalOperation {
  const char* name;
  const std::vector<TensorPair>* pairs;
};

// The rendezvous of the members of one group, where they show each other what they bring to an
// operation. An operation has two. The first waits for all members, within the time-out. Between
// the two, members read each other's tensors and wait for nothing, so the second has no time-out:
// nobody leaves, with a result or an error, while another still reads.
class LocalMeetingPoint {
 public:
  LocalMeetingPoint(int size, std::chrono::milliseconds timeout)
      : size_(size), timeout_(timeout), operations_(static_cast<size_t>(size)) {}

  // Shows `operation` to the others and returns when all members have come. The caller must then
  // call end_reading() on every path. After a time-out every later call fails at once.
  void begin(const GroupInfo& group, const LocalOperation& operation) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (is_broken_) throw CommError("a member of " + group.name + " left after an error.");
    operations_[static_cast<size_t>(group.rank)] = operation;
    const int64_t generation = generation_;
    if (++num_arrived_ == size_) {
      num_arrived_ = 0;
      num_reading_ = size_;
      ++generation_;
      changed_.notify_all();
      return;
    }
    const bool is_done =
        changed_.wait_for(lock, timeout_, [&] { return generation_ != generation || is_broken_; });
    if (generation_ != generation) return;
    is_broken_ = true;
    changed_.notify_all();
    if (is_done) throw CommError("a member of " + group.name + " left after an error.");
    throw TimeoutError(detail::concatenate(
        "every member of a group must issue the same collectives: got ", num_arrived_, " of ",
        size_, " members within ", timeout_.count(), " ms (group ", group.name, ", world_rank=",
        group.world_ranks[static_cast<size_t>(group.rank)], "). See docs/errors.md#timeouts."));
  }

  // Returns when no member reads any more.
  void end_reading() {
    std::unique_lock<std::mutex> lock(mutex_);
    if (--num_reading_ == 0) return changed_.notify_all();
    // Stays 0 until all members have come to the next operation, this one included.
    changed_.wait(lock, [&] { return num_reading_ == 0; });
  }

  // Valid between begin() and end_reading().
  const LocalOperation& operation_of(int rank) const {
    return operations_[static_cast<size_t>(rank)];
  }

 private:
  const int size_;
  const std::chrono::milliseconds timeout_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  int num_arrived_ = 0;
  int num_reading_ = 0;
  int64_t generation_ = 0;
  bool is_broken_ = false;
  // Written under mutex_ before the first rendezvous, read without it until the second.
  std::vector<LocalOperation> operations_;
};

namespace {

at::Tensor piece_of(const at::Tensor& tensor, int64_t numel, int index) {
  return tensor.narrow(0, numel * index, numel);
}

// One member's part in one operation: from the first rendezvous to the second, on every path.
class Visit {
 public:
  Visit(LocalMeetingPoint& meeting_point, const GroupInfo& group, const LocalOperation& operation)
      : meeting_point_(meeting_point), group_(group) {
    meeting_point_.begin(group, operation);
    try {
      check_same_operation(operation);
    } catch (...) {
      end_reading();
      throw;
    }
  }
  ~Visit() { end_reading(); }
  Visit(const Visit&) = delete;
  Visit& operator=(const Visit&) = delete;

  const std::vector<TensorPair>& pairs_of(int member) const {
    return *meeting_point_.operation_of(member).pairs;
  }

  // Returns when this member's tensors may be written. A second call does nothing.
  void end_reading() {
    if (is_reading_) meeting_point_.end_reading();
    is_reading_ = false;
  }

 private:
  // Every member sees what all bring, so each detects a mismatch by itself.
  void check_same_operation(const LocalOperation& own) const {
    for (int member = 0; member < group_.size(); ++member) {
      const LocalOperation& other = meeting_point_.operation_of(member);
      bool is_same = std::string_view(other.name) == own.name &&  //
                     other.pairs->size() == own.pairs->size();
      for (size_t i = 0; is_same && i < own.pairs->size(); ++i) {
        const at::Tensor& input = (*own.pairs)[i].input;
        const at::Tensor& other_input = (*other.pairs)[i].input;
        is_same = other_input.numel() == input.numel() &&
                  other_input.scalar_type() == input.scalar_type();
      }
      if (is_same) continue;
      throw CommError(detail::concatenate(
          own.name, " needs the same operation, sizes and dtypes on every member: world_rank ",
          group_.world_ranks[static_cast<size_t>(member)], " differs from world_rank ",
          group_.world_ranks[static_cast<size_t>(group_.rank)], " (group ", group_.name, ")."));
    }
  }

  LocalMeetingPoint& meeting_point_;
  const GroupInfo& group_;
  bool is_reading_ = true;
};

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(GroupInfo group, std::shared_ptr<LocalMeetingPoint> meeting_point)
      : Communicator(std::move(group)), meeting_point_(std::move(meeting_point)) {}

  void barrier() override {
    const std::vector<TensorPair> no_pairs;
    const Visit visit(*meeting_point_, group(), {"barrier", &no_pairs});
  }

 protected:
  Route gather_route() const override { return Route::kDirect; }

  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    const Visit visit(*meeting_point_, group(), {"all_gather", &pairs});
    for (size_t i = 0; i < pairs.size(); ++i) {
      for (int member = 0; member < group().size(); ++member) {
        const at::Tensor& input = visit.pairs_of(member)[i].input;
        const at::Tensor place = piece_of(pairs[i].output, input.numel(), member);
        if (place.numel() == 0 || place.const_data_ptr() == input.const_data_ptr()) continue;
        place.copy_(input);
      }
    }
  }

  // Outputs may lie in inputs that peers still read, so they are written after the reading.
  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    Visit visit(*meeting_point_, group(), {"reduce_scatter", &pairs});
    std::vector<at::Tensor> sums;
    for (size_t i = 0; i < pairs.size(); ++i) {
      sums.push_back(sum_pieces(visit, i, pairs[i].output));
    }
    visit.end_reading();
    for (size_t i = 0; i < pairs.size(); ++i) pairs[i].output.copy_(sums[i]);
  }

  void do_all_reduce(const at::Tensor& tensor) override {
    const std::vector<TensorPair> pairs = {{tensor, tensor}};
    Visit visit(*meeting_point_, group(), {"all_reduce", &pairs});
    std::vector<at::Tensor> pieces;
    for (int member = 0; member < group().size(); ++member) {
      pieces.push_back(visit.pairs_of(member)[0].input);
    }
    const at::Tensor sum = at::empty_like(tensor);
    sum_in_order(sum, pieces);
    visit.end_reading();
    tensor.copy_(sum);
  }

 private:
  at::Tensor sum_pieces(const Visit& visit, size_t pair, const at::Tensor& output) const {
    std::vector<at::Tensor> pieces;
    for (int member = 0; member < group().size(); ++member) {
      pieces.push_back(piece_of(visit.pairs_of(member)[pair].input, output.numel(), group().rank));
    }
    at::Tensor sum = at::empty_like(output);
    sum_in_order(sum, pieces);
    return sum;
  }

  const std::shared_ptr<LocalMeetingPoint> meeting_point_;
};

}  // namespace

LocalWorld::LocalWorld(int world_size, std::chrono::milliseconds timeout)
    : world_size_(world_size), timeout_(timeout) {
  MICS_CHECK(world_size >= 1, "a world must have at least one rank: got world_size=", world_size,
             ".");
}

LocalWorld::~LocalWorld() = default;

std::unique_ptr<Communicator> LocalWorld::make_communicator(GroupInfo group) {
  std::ostringstream key;
  key << group.name;
  for (const int rank : group.world_ranks) {
    MICS_CHECK(rank >= 0 && rank < world_size_,
               "members must be ranks of the world: got world_rank=", rank,
               ", world_size=", world_size_, " (", group.name, ").");
    key << " " << rank;
  }
  std::shared_ptr<LocalMeetingPoint> meeting_point;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<LocalMeetingPoint>& entry = meeting_points_[key.str()];
    if (!entry) entry = std::make_shared<LocalMeetingPoint>(group.size(), timeout_);
    meeting_point = entry;
  }
  return std::make_unique<LocalCommunicator>(std::move(group), std::move(meeting_point));
}

}  // namespace mics
