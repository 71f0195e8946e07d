#include "mics/c10d_communicator.h"

#include <algorithm>
#include <functional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>

#include "comm/c10d/staging.h"
#include "mics/error.h"
#include "plan/check.h"

namespace mics {

namespace {

using TensorMember = at::Tensor TensorPair::*;

int64_t total_numel(const std::vector<TensorPair>& pairs, TensorMember member) {
  int64_t numel = 0;
  for (const TensorPair& pair : pairs) numel += (pair.*member).numel();
  return numel;
}

// A contiguous tensor flattened, and viewed as bytes where Gloo does not know the dtype.
at::Tensor as_message(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.dim() == 1 ? tensor : tensor.view({-1});
  return flat.scalar_type() == at::kBFloat16 ? flat.view(at::kByte) : flat;
}

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

bool is_fake(c10d::ProcessGroup& group) {
  const std::vector<c10::Device> devices = group.getDeviceTypes();
  return std::any_of(devices.begin(), devices.end(), [&](c10::Device device) {
    return group.getBackend(device.type())->getBackendName() == "fake";
  });
}

class C10dCommunicator final : public Communicator {
 public:
  C10dCommunicator(GroupInfo group, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
                   std::chrono::milliseconds timeout)
      : Communicator(std::move(group)),
        process_group_(std::move(process_group)),
        timeout_(timeout),
        moves_data_(!is_fake(*process_group_)) {
    const int size = process_group_->getSize();
    const int rank = process_group_->getRank();
    MICS_CHECK(size == this->group().size() && rank == this->group().rank,
               "the process group must have the members of the group: got size=", size,
               ", rank=", rank, ", expected size=", this->group().size(),
               ", rank=", this->group().rank, " (", this->group().name, ").");
  }

  int64_t staging_nbytes() const override { return staging_.nbytes(); }
  bool moves_data() const override { return moves_data_; }

  void barrier() override {
    c10d::BarrierOptions options;
    options.timeout = timeout_;
    run("barrier", [&] { return process_group_->barrier(options); });
  }

 protected:
  // Gloo's all-gather is a ring.
  Route gather_route() const override { return Route::kRing; }

  // A ProcessGroup has no grouped launch, so the pieces of several pairs are sent as one message.
  void do_all_gather(const std::vector<TensorPair>& pairs) override {
    if (pairs.size() == 1) return gather_bytes(pairs[0].output, pairs[0].input);
    const int64_t numel = total_numel(pairs, &TensorPair::input);
    if (numel == 0) return;
    const at::Tensor& like = pairs.front().input;
    const at::Tensor sent = staging_.sent(like, numel);
    const at::Tensor received = staging_.received(like, group().size() * numel);
    pack_inputs(pairs, sent);
    gather_bytes(received, sent);
    unpack_output_pieces(received, group().size(), pairs);
  }

  void do_reduce_scatter(const std::vector<TensorPair>& pairs) override {
    const int64_t numel = total_numel(pairs, &TensorPair::output);
    if (numel == 0) return;
    if (pairs.size() == 1) return reduce_rows(pairs[0].output, pairs[0].input);
    const at::Tensor& like = pairs.front().input;
    const at::Tensor sent = staging_.sent(like, group().size() * numel);
    const at::Tensor sum = staging_.sum(like, numel);
    pack_input_pieces(pairs, group().size(), sent);
    reduce_rows(sum, sent);
    unpack_outputs(sum, pairs);
  }

  void do_all_reduce(const at::Tensor& tensor) override {
    const int64_t size = group().size();
    const int64_t piece = (tensor.numel() + size - 1) / size;
    at::Tensor whole = tensor.view({-1});
    if (piece * size != tensor.numel()) {
      whole = staging_.sent(tensor, piece * size);
      whole.narrow(0, 0, tensor.numel()).copy_(tensor.view({-1}));
      whole.narrow(0, tensor.numel(), piece * size - tensor.numel()).zero_();
    }
    const at::Tensor sum = staging_.sum(tensor, piece);
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
    at::Tensor received = as_message(output);
    at::Tensor sent = as_message(input);
    run("all_gather", [&] { return start_all_gather(*process_group_, received, sent, options); });
  }

  // Sends row r of `input` to member r and sums the rows that arrive, in member order.
  void reduce_rows(const at::Tensor& output, const at::Tensor& input) {
    c10d::AllToAllOptions options;
    options.timeout = timeout_;
    const at::Tensor received = staging_.received(input, group().size() * output.numel());
    at::Tensor received_message = as_message(received);
    at::Tensor sent = as_message(input);
    run("reduce_scatter",
        [&] { return start_all_to_all(*process_group_, received_message, sent, options); });
    sum_rows_in_order(output, received);
  }

  // Issues an operation and waits for it. If it fails, the error names operation, group and rank.
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
  const bool moves_data_;
  Staging staging_;  // used where the operations run
  // For messages. Counted where the operations run; traffic is counted on the issuing thread.
  int64_t num_started_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> make_c10d_communicator(
    GroupInfo group, c10::intrusive_ptr<c10d::ProcessGroup> process_group,
    std::chrono::milliseconds timeout) {
  return std::make_unique<C10dCommunicator>(std::move(group), std::move(process_group), timeout);
}

}  // namespace mics
