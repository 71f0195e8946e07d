#include "mics/c10d_communicator.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <functional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "mics/check.h"
#include "mics/error.h"

namespace mics {

namespace {

using TensorMember = at::Tensor TensorPair::*;

int64_t total_numel(const std::vector<TensorPair>& pairs, TensorMember member) {
  int64_t numel = 0;
  for (const TensorPair& pair : pairs) numel += (pair.*member).numel();
  return numel;
}

// The bytes of a contiguous tensor: transport needs no dtype, and Gloo knows only some.
at::Tensor as_bytes(const at::Tensor& tensor) { return tensor.flatten().view(at::kByte); }

// torch 2.15 renames both operations and deprecates the names that 2.11 has. Templates, so that
// only the name that exists is compiled.
template <typename Group>
c10::intrusive_ptr<c10d::Work> start_all_gather(Group& group, at::Tensor& output, at::Tensor& input,
                                                const c10d::AllgatherOptions& options) {
  if constexpr (requires { group.all_gather_single(output, input, options); }) {
    return group.all_gather_single(output, input, options);
  } else {
    return group._allgather_base(output, input, options);
  }
}

template <typename Group>
c10::intrusive_ptr<c10d::Work> start_all_to_all(Group& group, at::Tensor& output, at::Tensor& input,
                                                const c10d::AllToAllOptions& options) {
  std::vector<int64_t> equal_splits;
  if constexpr (requires {
                  group.all_to_all_single(output, input, equal_splits, equal_splits, options);
                }) {
    return group.all_to_all_single(output, input, equal_splits, equal_splits, options);
  } else {
    return group.alltoall_base(output, input, equal_splits, equal_splits, options);
  }
}

class C10dCommunicator final : public Communicator {
 public:
  C10dCommunicator(GroupInfo group, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
                   std::chrono::milliseconds timeout)
      : Communicator(std::move(group)),
        process_group_(std::move(process_group)),
        timeout_(timeout) {
    const int size = process_group_->getSize();
    const int rank = process_group_->getRank();
    MICS_CHECK(size == this->group().size() && rank == this->group().rank,
               "the process group must have the members of the group: got size=", size,
               ", rank=", rank, ", expected size=", this->group().size(),
               ", rank=", this->group().rank, " (", this->group().name, ").");
  }

  void barrier() override {
    c10d::BarrierOptions options;
    options.timeout = timeout_;
    run("barrier", [&] { return process_group_->barrier(options); });
  }

 protected:
  // Gloo's all-gather is a ring.
  GatherRoute gather_route() const override { return GatherRoute::kRing; }

  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    if (pairs.size() == 1) return gather_bytes(pairs[0].output, pairs[0].input);
    // A ProcessGroup has no grouped launch: the pieces travel as one message.
    const int64_t numel = total_numel(pairs, &TensorPair::input);
    if (numel == 0) return;
    const at::TensorOptions options = pairs.front().input.options();
    const at::Tensor sent = at::empty({numel}, options);
    const at::Tensor received = at::empty({group().size(), numel}, options);
    int64_t offset = 0;
    for (const TensorPair& pair : pairs) {
      sent.narrow(0, offset, pair.input.numel()).copy_(pair.input);
      offset += pair.input.numel();
    }
    gather_bytes(received, sent);
    offset = 0;
    for (const TensorPair& pair : pairs) {
      const int64_t piece = pair.input.numel();
      pair.output.view({group().size(), piece}).copy_(received.narrow(1, offset, piece));
      offset += piece;
    }
  }

  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    const int64_t numel = total_numel(pairs, &TensorPair::output);
    if (numel == 0) return;
    if (pairs.size() == 1) return reduce_rows(pairs[0].output, pairs[0].input);
    const at::TensorOptions options = pairs.front().input.options();
    const at::Tensor sent = at::empty({group().size(), numel}, options);
    const at::Tensor sum = at::empty({numel}, options);
    int64_t offset = 0;
    for (const TensorPair& pair : pairs) {
      const int64_t piece = pair.output.numel();
      sent.narrow(1, offset, piece).copy_(pair.input.view({group().size(), piece}));
      offset += piece;
    }
    reduce_rows(sum, sent);
    offset = 0;
    for (const TensorPair& pair : pairs) {
      pair.output.copy_(sum.narrow(0, offset, pair.output.numel()));
      offset += pair.output.numel();
    }
  }

  void do_all_reduce(const at::Tensor& tensor) override {
    const int64_t size = group().size();
    const int64_t piece = (tensor.numel() + size - 1) / size;
    at::Tensor whole = tensor.view({-1});
    if (piece * size != tensor.numel()) {
      whole = at::zeros({piece * size}, tensor.options());
      whole.narrow(0, 0, tensor.numel()).copy_(tensor.view({-1}));
    }
    const at::Tensor sum = at::empty({piece}, tensor.options());
    reduce_rows(sum, whole);
    gather_bytes(whole, sum);
    if (whole.numel() != tensor.numel())
      tensor.view({-1}).copy_(whole.narrow(0, 0, tensor.numel()));
  }

 private:
  void gather_bytes(const at::Tensor& output, const at::Tensor& input) {
    if (input.numel() == 0) return;
    c10d::AllgatherOptions options;
    options.timeout = timeout_;
    at::Tensor output_bytes = as_bytes(output);
    at::Tensor input_bytes = as_bytes(input);
    run("all_gather",
        [&] { return start_all_gather(*process_group_, output_bytes, input_bytes, options); });
  }

  // Sends row r of `input` to member r and sums the rows that arrive, in member order.
  void reduce_rows(const at::Tensor& output, const at::Tensor& input) {
    c10d::AllToAllOptions options;
    options.timeout = timeout_;
    const at::Tensor received = at::empty({group().size(), output.numel()}, input.options());
    at::Tensor received_bytes = as_bytes(received);
    at::Tensor input_bytes = as_bytes(input);
    run("reduce_scatter",
        [&] { return start_all_to_all(*process_group_, received_bytes, input_bytes, options); });
    sum_in_order(output.view({-1}), received.unbind(0));
  }

  // Issues an operation, waits for it and says who and where when it fails.
  void run(const char* op, const std::function<c10::intrusive_ptr<c10d::Work>()>& issue) {
    ++num_started_;
    try {
      issue()->wait();
    } catch (const std::exception& error) {
      const std::string reason = error.what();
      const std::string message = detail::concatenate(
          op, " failed: operation ", num_started_, " of group ", group().name, " [world ranks ",
          describe_members(),
          "] (world_rank=", group().world_ranks[static_cast<size_t>(group().rank)],
          "). A member has ended or issues other collectives; see docs/errors.md#comm. Reason: ",
          reason);
      const bool is_timeout = reason.find("imed out") != std::string::npos;
      if (is_timeout) throw TimeoutError(message);
      throw CommError(message);
    }
  }

  std::string describe_members() const {
    std::string text;
    for (const int rank : group().world_ranks) {
      if (!text.empty()) text += ' ';
      text += std::to_string(rank);
    }
    return text;
  }

  const c10::intrusive_ptr<c10d::ProcessGroup> process_group_;
  const std::chrono::milliseconds timeout_;
  // For messages. Traffic is counted on the issuing thread, this where the operation runs.
  int64_t num_started_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> make_c10d_communicator(
    GroupInfo group, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
    std::chrono::milliseconds timeout) {
  return std::make_unique<C10dCommunicator>(std::move(group), std::move(process_group), timeout);
}

}  // namespace mics
