// VirtualNetwork: communicators whose operations take the time of a link on a VirtualClock.
//
// An operation is ready when all members have come to it. It then takes, on the link of each rank,
// latency + received bytes / bandwidth. Results are those of the local backend.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "mics/communicator.h"
#include "plan/check.h"
#include "support/virtual_streams.h"

namespace mics::testing {

// What a member brings to an operation.
struct VirtualPart {
  std::vector<TensorPair> pairs;
  VirtualStream* stream = nullptr;  // that it holds
  const VirtualLink* link = nullptr;
  Nanoseconds duration{0};
};

// Where the members of a group meet. Used by work of virtual streams only: one at a time.
struct VirtualMeeting {
  explicit VirtualMeeting(int size) : parts(static_cast<size_t>(size)) {}
  std::vector<VirtualPart> parts;
  size_t num_come = 0;
};

class VirtualCommunicator final : public Communicator {
 public:
  // `link` null: operations take no time. It outlives the communicator.
  VirtualCommunicator(GroupInfo group, VirtualClock& clock, const VirtualLink* link,
                      std::shared_ptr<VirtualMeeting> meeting)
      : Communicator(std::move(group)), clock_(clock), link_(link), meeting_(std::move(meeting)) {}
  void barrier() override { MICS_INTERNAL_CHECK(false, "a virtual group has no barrier."); }
  // Of the last operation.
  [[nodiscard]] Nanoseconds duration() const { return duration_; }

 protected:
  Route gather_route() const override { return Route::kDirect; }
  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    int64_t nbytes = 0;
    for (const TensorPair& pair : pairs) nbytes += difference(pair.output, pair.input);
    come(pairs, nbytes, &gather);
  }
  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    int64_t nbytes = 0;
    for (const TensorPair& pair : pairs) nbytes += difference(pair.input, pair.output);
    come(pairs, nbytes, &scatter_sums);
  }
  void do_all_reduce(const at::Tensor& tensor) override {
    const int64_t nbytes =
        2 * static_cast<int64_t>(tensor.nbytes()) * (group().size() - 1) / group().size();
    come({{tensor, tensor}}, nbytes, &sum);
  }

 private:
  using Parts = std::vector<VirtualPart>;

  static int64_t difference(const at::Tensor& larger, const at::Tensor& smaller) {
    return static_cast<int64_t>(larger.nbytes()) - static_cast<int64_t>(smaller.nbytes());
  }
  void come(const std::vector<TensorPair>& pairs, int64_t nbytes, void (*run)(const Parts&)) {
    duration_ = link_ == nullptr ? Nanoseconds(0) : link_->duration(nbytes);
    VirtualStream& stream = clock_.hold_running_stream();
    Parts& parts = meeting_->parts;
    parts[static_cast<size_t>(group().rank)] = {pairs, &stream, link_, duration_};
    if (++meeting_->num_come < parts.size()) return;
    meeting_->num_come = 0;
    {
      const c10::InferenceMode no_inference(false);
      const c10::NoGradGuard no_grad;
      run(parts);
    }
    for (VirtualPart& part : parts) {
      clock_.carry(*part.stream, part.link, part.duration, group().name);
      part = VirtualPart();
    }
  }

  static at::Tensor piece(const at::Tensor& whole, const at::Tensor& one, size_t index) {
    return whole.narrow(0, one.numel() * static_cast<int64_t>(index), one.numel());
  }
  static void gather(const Parts& parts) {
    for (const VirtualPart& to : parts) {
      for (size_t member = 0; member < parts.size(); ++member) {
        for (size_t i = 0; i < to.pairs.size(); ++i) {
          const at::Tensor& input = parts[member].pairs[i].input;
          const at::Tensor place = piece(to.pairs[i].output, input, member);
          if (place.const_data_ptr() != input.const_data_ptr()) place.copy_(input);
        }
      }
    }
  }
  // Outputs may lie in inputs: sums first.
  static void scatter_sums(const Parts& parts) {
    std::vector<std::pair<at::Tensor, at::Tensor>> results;
    for (size_t to = 0; to < parts.size(); ++to) {
      for (size_t i = 0; i < parts[to].pairs.size(); ++i) {
        const at::Tensor& output = parts[to].pairs[i].output;
        std::vector<at::Tensor> pieces;
        for (const VirtualPart& from : parts) {
          pieces.push_back(piece(from.pairs[i].input, output, to));
        }
        results.emplace_back(output, summed(pieces));
      }
    }
    for (const auto& [output, result] : results) output.copy_(result);
  }
  static void sum(const Parts& parts) {
    std::vector<at::Tensor> pieces;
    for (const VirtualPart& part : parts) pieces.push_back(part.pairs[0].input);
    const at::Tensor result = summed(pieces);
    for (const VirtualPart& part : parts) part.pairs[0].output.copy_(result);
  }
  static at::Tensor summed(const std::vector<at::Tensor>& pieces) {
    at::Tensor result = at::empty_like(pieces.front());
    sum_in_order(result, pieces);
    return result;
  }

  VirtualClock& clock_;
  const VirtualLink* const link_;
  const std::shared_ptr<VirtualMeeting> meeting_;
  Nanoseconds duration_{0};
};

// Outlives the communicators that it makes. Thread-safe.
class VirtualNetwork {
 public:
  explicit VirtualNetwork(VirtualClock& clock) : clock_(clock) {}
  [[nodiscard]] std::unique_ptr<VirtualCommunicator> make_communicator(const GroupInfo& group,
                                                                       const VirtualLink* link) {
    std::shared_ptr<VirtualMeeting> meeting;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      std::shared_ptr<VirtualMeeting>& entry = meetings_[{group.name, group.world_ranks}];
      if (entry == nullptr) entry = std::make_shared<VirtualMeeting>(group.size());
      meeting = entry;
    }
    return std::make_unique<VirtualCommunicator>(group, clock_, link, std::move(meeting));
  }

 private:
  VirtualClock& clock_;
  std::mutex mutex_;
  std::map<std::pair<std::string, std::vector<int>>, std::shared_ptr<VirtualMeeting>>
      meetings_;  // guarded by mutex_
};

}  // namespace mics::testing
