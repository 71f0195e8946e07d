// ShmNetwork: ranks of FakeNccl that are processes of one host. Their members meet in shared
// memory.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "mics/shm_communicator.h"
#include "support/fake_network.h"
#include "support/fake_tensor.h"

namespace mics::testing {

class ShmMembers final : public FakeMembers {
 public:
  ShmMembers(FakeNetwork& network, const std::string& key, int size, int rank)
      : network_(network), key_(key), group_(group_of(key, size, rank), options_of(key, rank)) {
    communicator_ = group_.make_communicator();
  }

  int size() const override { return communicator_->group().size(); }
  bool meet(int /*rank*/, const std::atomic<bool>& /*is_aborted*/) override {
    communicator_->barrier();
    return true;
  }
  void notify() override {}

  void run(int /*rank*/, const std::vector<FakeCall>& calls,
           const std::atomic<bool>& is_aborted) override {
    try {
      for (const FakeCall& call : calls) run(call);
    } catch (const std::exception& error) {
      network_.add_fault(key_ + ": " + error.what());
      while (!is_aborted) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }

 private:
  static GroupInfo group_of(const std::string& key, int size, int rank) {
    GroupInfo group{key, {}, std::vector<int>(static_cast<size_t>(size), 0), rank};
    for (int other = 0; other < size; ++other) group.world_ranks.push_back(other);
    return group;
  }
  static ShmOptions options_of(const std::string& key, int rank) {
    ShmOptions options;
    options.segment = key;
    options.creates = rank == 0;
    options.timeout = std::chrono::seconds(60);
    return options;
  }

  void run(const FakeCall& call) {
    const auto count = static_cast<int64_t>(call.count);
    const int64_t all = count * size();
    const auto sent = [&](int64_t numel) {
      return fake_tensor(const_cast<void*>(call.send), numel, call.type);
    };
    if (!network_.sums_in_fp32 && (call.type == ncclBfloat16 || call.type == ncclFloat16) &&
        call.kind != FakeCall::Kind::kAllGather) {
      return sum_in_wire_dtype(call);
    }
    switch (call.kind) {
      case FakeCall::Kind::kAllGather:
        return communicator_->all_gather(fake_tensor(call.receive, all, call.type), sent(count),
                                         *stream_);
      case FakeCall::Kind::kReduceScatter:
        return communicator_->reduce_scatter(fake_tensor(call.receive, count, call.type), sent(all),
                                             *stream_);
      case FakeCall::Kind::kAllReduce: {
        const at::Tensor tensor = fake_tensor(call.receive, count, call.type);
        if (call.receive != call.send) tensor.copy_(sent(count));
        return communicator_->all_reduce(tensor, *stream_);
      }
      case FakeCall::Kind::kRegister:  // of memory of one size
        return communicator_->all_reduce(at::zeros({count % 4096 + 1}, at::kFloat), *stream_);
    }
  }

  // The communicator sums in fp32, so everything is gathered and summed here.
  void sum_in_wire_dtype(const FakeCall& call) {
    const auto count = static_cast<int64_t>(call.count);
    const bool is_scatter = call.kind == FakeCall::Kind::kReduceScatter;
    const int64_t numel = is_scatter ? count * size() : count;
    const at::Tensor sent = fake_tensor(const_cast<void*>(call.send), numel, call.type);
    const at::Tensor all = at::empty({numel * size()}, sent.options());
    communicator_->all_gather(all, sent, *stream_);
    std::vector<at::Tensor> pieces;
    for (int member = 0; member < size(); ++member) {
      const at::Tensor of_member = all.narrow(0, numel * member, numel);
      pieces.push_back(is_scatter ? of_member.narrow(0, count * communicator_->group().rank, count)
                                  : of_member);
    }
    fake_sum(fake_tensor(call.receive, count, call.type), pieces, /*in_fp32=*/false);
  }

  FakeNetwork& network_;
  const std::string key_;
  ShmGroup group_;
  std::unique_ptr<Communicator> communicator_;
  const std::unique_ptr<Stream> stream_ = make_inline_stream();
};

class ShmNetwork final : public FakeNetwork {
 public:
  ncclUniqueId make_id() override {
    ncclUniqueId id = {};
    const std::string name = make_shm_segment_name();
    std::memcpy(id.internal, name.c_str(), name.size());
    return id;
  }
  std::shared_ptr<FakeMembers> join(const std::string& key, int size, int rank) override {
    return std::make_shared<ShmMembers>(*this, key, size, rank);
  }
};

}  // namespace mics::testing
