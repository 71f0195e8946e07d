// ThreadNetwork: ranks of FakeNccl that are threads of one process.
#pragma once

#include <ATen/ops/empty_like.h>

#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "mics/communicator.h"
#include "support/fake_network.h"
#include "support/fake_tensor.h"

namespace mics::testing {

class ThreadMembers final : public FakeMembers {
 public:
  ThreadMembers(FakeNetwork& network, std::string key, int size)
      : network_(network), key_(std::move(key)), size_(size), calls_(static_cast<size_t>(size)) {}

  int size() const override { return size_; }
  bool meet(int rank, const std::atomic<bool>& is_aborted) override {
    return show(rank, nullptr, is_aborted);
  }
  void notify() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

  void run(int rank, const std::vector<FakeCall>& calls,
           const std::atomic<bool>& is_aborted) override {
    if (!show(rank, &calls, is_aborted)) return;
    std::string difference;
    for (int other = 0; other < size_ && difference.empty(); ++other) {
      difference = compare(calls, calls_of(other));
    }
    if (!difference.empty()) {  // on every member: what all bring is not the same
      stay_until_all_have_come();
      network_.add_fault(key_ + ": " + difference);
      return wait_for_abort(is_aborted);
    }
    std::vector<at::Tensor> sums;
    for (size_t i = 0; i < calls.size(); ++i) sums.push_back(read(rank, i, calls[i]));
    stay_until_all_have_come();
    for (size_t i = 0; i < calls.size(); ++i) {
      if (sums[i].defined()) {
        fake_tensor(calls[i].receive, sums[i].numel(), calls[i].type).copy_(sums[i]);
      }
    }
    // A peer's next operation may write what this one has read.
    stay_until_all_have_come();
  }

 private:
  // Shows `calls` to the others, or nothing, and returns when all have come. False: `is_aborted`.
  bool show(int rank, const std::vector<FakeCall>* calls, const std::atomic<bool>& is_aborted) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (calls != nullptr) calls_[static_cast<size_t>(rank)] = calls;
    const int64_t generation = generation_;
    if (++num_arrived_ == size_) {
      num_arrived_ = 0;
      ++generation_;
      changed_.notify_all();
      return true;
    }
    changed_.wait(lock, [&] { return generation_ != generation || is_aborted; });
    if (generation_ != generation) return true;
    --num_arrived_;
    return false;
  }
  // Returns when all have come, whatever is aborted: after a meeting of all, members only read and
  // write, and none may go while another reads what it has shown.
  void stay_until_all_have_come() {
    std::unique_lock<std::mutex> lock(mutex_);
    const int64_t generation = generation_;
    if (++num_arrived_ < size_) {
      return changed_.wait(lock, [&] { return generation_ != generation; });
    }
    num_arrived_ = 0;
    ++generation_;
    changed_.notify_all();
  }
  void wait_for_abort(const std::atomic<bool>& is_aborted) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return is_aborted.load(); });
  }
  // Valid between two meetings.
  [[nodiscard]] const std::vector<FakeCall>& calls_of(int rank) const {
    return *calls_[static_cast<size_t>(rank)];
  }

  // Gathers at once; gives what is to be written when all have read.
  [[nodiscard]] at::Tensor read(int rank, size_t index, const FakeCall& call) const {
    if (call.kind == FakeCall::Kind::kRegister) return {};
    const auto count = static_cast<int64_t>(call.count);
    const bool is_scatter = call.kind == FakeCall::Kind::kReduceScatter;
    std::vector<at::Tensor> pieces;
    for (int other = 0; other < size_; ++other) {
      const at::Tensor sent = fake_tensor(const_cast<void*>(calls_of(other)[index].send),
                                          is_scatter ? count * size_ : count, call.type);
      pieces.push_back(is_scatter ? sent.narrow(0, count * rank, count) : sent);
    }
    if (call.kind != FakeCall::Kind::kAllGather) {
      at::Tensor sum = at::empty_like(pieces.front());
      fake_sum(sum, pieces, network_.sums_in_fp32);
      return sum;
    }
    const at::Tensor to = fake_tensor(call.receive, count * size_, call.type);
    for (int other = 0; other < size_; ++other) {
      const at::Tensor place = to.narrow(0, count * other, count);
      const at::Tensor& from = pieces[static_cast<size_t>(other)];
      if (place.const_data_ptr() != from.const_data_ptr()) place.copy_(from);
    }
    return {};
  }

  static std::string compare(const std::vector<FakeCall>& mine,
                             const std::vector<FakeCall>& theirs) {
    if (mine.size() != theirs.size()) return "groups of other sizes";
    for (size_t i = 0; i < mine.size(); ++i) {
      if (mine[i].kind != theirs[i].kind) return "other calls";
      if (mine[i].count != theirs[i].count) return "other counts";
      if (mine[i].type != theirs[i].type) return "other types";
    }
    return {};
  }

  FakeNetwork& network_;
  const std::string key_;
  const int size_;
  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  int num_arrived_ = 0;
  int64_t generation_ = 0;
  std::vector<const std::vector<FakeCall>*> calls_;
};

class ThreadNetwork final : public FakeNetwork {
 public:
  ncclUniqueId make_id() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    ncclUniqueId id = {};
    const std::string text = "id " + std::to_string(++num_ids_);
    std::memcpy(id.internal, text.c_str(), text.size());
    return id;
  }
  std::shared_ptr<FakeMembers> join(const std::string& key, int size, int /*rank*/) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<ThreadMembers>& found = members_[key];
    if (found == nullptr) found = std::make_shared<ThreadMembers>(*this, key, size);
    return found;
  }

 private:
  std::mutex mutex_;
  // Guarded by mutex_.
  int num_ids_ = 0;
  std::map<std::string, std::shared_ptr<ThreadMembers>> members_;
};

}  // namespace mics::testing
