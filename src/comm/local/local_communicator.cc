#include <ATen/ops/empty_like.h>

#include <condition_variable>
#include <sstream>
#include <utility>

#include "mics/check.h"
#include "mics/error.h"
#include "mics/local_world.h"

namespace mics {

// Where the members of one group show each other what they bring to an operation.
class LocalMeetingPoint {
 public:
  LocalMeetingPoint(int size, std::chrono::milliseconds timeout)
      : size_(size), timeout_(timeout), pairs_(static_cast<size_t>(size)) {}

  // Shows `pairs` to the others and returns when all members have come.
  void show(int rank, const GroupInfo& group, const std::vector<TensorPair>* pairs) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      pairs_[static_cast<size_t>(rank)] = pairs;
    }
    meet(group);
  }

  // Returns when all members have come. After a time-out every later call fails at once.
  void meet(const GroupInfo& group) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (is_broken_) throw CommError("a member of " + group.name + " left after an error.");
    const int64_t generation = generation_;
    if (++num_arrived_ == size_) {
      num_arrived_ = 0;
      ++generation_;
      all_arrived_.notify_all();
      return;
    }
    const bool is_done = all_arrived_.wait_for(
        lock, timeout_, [&] { return generation_ != generation || is_broken_; });
    if (generation_ != generation) return;
    is_broken_ = true;
    all_arrived_.notify_all();
    if (is_done) throw CommError("a member of " + group.name + " left after an error.");
    throw TimeoutError(detail::concatenate(
        "every member of a group must issue the same collectives: got ", num_arrived_, " of ",
        size_, " members within ", timeout_.count(), " ms (group ", group.name, ", world_rank=",
        group.world_ranks[static_cast<size_t>(group.rank)], "). See docs/errors.md#timeouts."));
  }

  // Valid between show() and the meet() that ends the operation.
  const std::vector<TensorPair>& pairs_of(int rank) const {
    return *pairs_[static_cast<size_t>(rank)];
  }

 private:
  const int size_;
  const std::chrono::milliseconds timeout_;
  std::mutex mutex_;
  std::condition_variable all_arrived_;
  // Guarded by mutex_.
  int num_arrived_ = 0;
  int64_t generation_ = 0;
  bool is_broken_ = false;
  // Written under mutex_ before a meeting, read without it after: the meeting orders the two.
  std::vector<const std::vector<TensorPair>*> pairs_;
};

namespace {

at::Tensor piece_of(const at::Tensor& tensor, int64_t numel, int index) {
  return tensor.narrow(0, numel * index, numel);
}

class LocalCommunicator final : public Communicator {
 public:
  LocalCommunicator(GroupInfo group, std::shared_ptr<LocalMeetingPoint> meeting_point)
      : Communicator(std::move(group)), meeting_point_(std::move(meeting_point)) {}

  void barrier() override { meeting_point_->meet(group()); }

 protected:
  Route gather_route() const override { return Route::kDirect; }

  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    meeting_point_->show(group().rank, group(), &pairs);
    check_same_pairs("all_gather", pairs);
    for (size_t i = 0; i < pairs.size(); ++i) {
      for (int member = 0; member < group().size(); ++member) {
        const at::Tensor& input = meeting_point_->pairs_of(member)[i].input;
        const at::Tensor place = piece_of(pairs[i].output, input.numel(), member);
        if (place.numel() == 0 || place.const_data_ptr() == input.const_data_ptr()) continue;
        place.copy_(input);
      }
    }
    meeting_point_->meet(group());
  }

  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    meeting_point_->show(group().rank, group(), &pairs);
    check_same_pairs("reduce_scatter", pairs);
    std::vector<at::Tensor> sums;
    for (size_t i = 0; i < pairs.size(); ++i) sums.push_back(sum_pieces(i, pairs[i].output));
    // Outputs may lie in inputs that peers still read, so they are written after a meeting.
    meeting_point_->meet(group());
    for (size_t i = 0; i < pairs.size(); ++i) pairs[i].output.copy_(sums[i]);
  }

  void do_all_reduce(const at::Tensor& tensor) override {
    const std::vector<TensorPair> pairs = {{tensor, tensor}};
    meeting_point_->show(group().rank, group(), &pairs);
    check_same_pairs("all_reduce", pairs);
    std::vector<at::Tensor> pieces;
    for (int member = 0; member < group().size(); ++member) {
      pieces.push_back(meeting_point_->pairs_of(member)[0].input);
    }
    const at::Tensor sum = at::empty_like(tensor);
    sum_in_order(sum, pieces);
    meeting_point_->meet(group());
    tensor.copy_(sum);
  }

 private:
  at::Tensor sum_pieces(size_t pair, const at::Tensor& output) const {
    std::vector<at::Tensor> pieces;
    for (int member = 0; member < group().size(); ++member) {
      pieces.push_back(
          piece_of(meeting_point_->pairs_of(member)[pair].input, output.numel(), group().rank));
    }
    at::Tensor sum = at::empty_like(output);
    sum_in_order(sum, pieces);
    return sum;
  }

  // Every member sees all arguments, so each can refuse a mismatch by itself.
  void check_same_pairs(const char* op, const std::vector<TensorPair>& pairs) const {
    for (int member = 0; member < group().size(); ++member) {
      const std::vector<TensorPair>& other = meeting_point_->pairs_of(member);
      bool is_same = other.size() == pairs.size();
      for (size_t i = 0; is_same && i < pairs.size(); ++i) {
        is_same = other[i].input.numel() == pairs[i].input.numel() &&
                  other[i].input.scalar_type() == pairs[i].input.scalar_type();
      }
      if (is_same) continue;
      throw CommError(detail::concatenate(
          op, " needs the same sizes and dtypes on every member: world_rank ",
          group().world_ranks[static_cast<size_t>(member)], " differs from world_rank ",
          group().world_ranks[static_cast<size_t>(group().rank)], " (group ", group().name, ")."));
    }
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
