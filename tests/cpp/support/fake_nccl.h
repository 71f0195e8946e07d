// FakeNccl: NCCL between threads that are ranks, over FakeCuda, with the semantics of the real one.
//
//   - an operation is queued on a stream and starts when the stream reaches it
//   - one communicator runs its operations one after the other, on whatever streams, in the order
//     of launch
//   - an operation ends when all members have joined it with the same calls, sizes and types. Else
//     it stays, as the real one would, and FakeNetwork::faults() says why
//   - sums are in rank order, as communicator.h describes those of the other backends
//   - abort ends what waits; a communicator that has ended cannot be used
#pragma once

#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <gtest/gtest.h>

#include <condition_variable>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "comm/nccl/nccl_api.h"
#include "mics/communicator.h"
#include "support/fake_cuda.h"
#include "support/fake_network.h"

namespace mics::testing {

class FakeNccl final : public NcclApi {
 public:
  FakeNccl(std::shared_ptr<FakeNetwork> network, std::shared_ptr<FakeCuda> cuda)
      : network_(std::move(network)), cuda_(std::move(cuda)) {}

  // --- faults
  // --------------------------------------------------------------------------------------

  void set_version(int version) { version_ = version; }
  void set_has_split(bool has_split) { has_split_ = has_split; }
  // The call of this name fails from here on.
  void fail(const std::string& call, ncclResult_t result) { failing_[call] = result; }
  // A start in non-blocking mode does not end.
  void stall_starts() { stalls_starts_ = true; }
  // Of all communicators of this rank, as after a link has failed.
  void set_async_error(ncclResult_t error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [handle, comm] : comms_) comm->async_error = error;
  }
  // Operations whose streams had reached them and that were not done, at most.
  [[nodiscard]] int most_under_way() const { return under_way_->most; }
  [[nodiscard]] std::map<std::string, int> take_counts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(counts_, {});
  }

  // --- NcclApi
  // -------------------------------------------------------------------------------------

  ncclResult_t get_version(int* version) override {
    *version = version_;
    return ncclSuccess;
  }
  ncclResult_t get_unique_id(ncclUniqueId* id) override {
    *id = network_->make_id();
    return result_of("get_unique_id");
  }
  ncclResult_t comm_init_rank_config(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                     ncclConfig_t* config) override {
    count("comm_init_rank_config");
    if (const ncclResult_t result = result_of("comm_init_rank_config"); result != ncclSuccess) {
      return result;
    }
    int number = 0;
    std::memcpy(&number, id.internal, sizeof(number));
    return start(comm, "id " + std::to_string(number), size, rank, config->blocking != 0);
  }
  bool has_comm_split() const override { return has_split_; }
  ncclResult_t comm_split(ncclComm_t comm, int color, int key, ncclComm_t* made,
                          ncclConfig_t* config) override {
    count("comm_split");
    const std::shared_ptr<FakeComm> parent = find(comm, "comm_split");
    if (parent == nullptr) return ncclInvalidArgument;
    if (config->splitShare != 0) network_->add_fault("a split that shares resources");
    if (key != parent->rank) network_->add_fault("a split in another order of ranks");
    return start(made,
                 parent->key + " split " + std::to_string(parent->num_splits++) + " color " +
                     std::to_string(color),
                 parent->members->size(), key, config->blocking != 0);
  }
  ncclResult_t comm_get_async_error(ncclComm_t comm, ncclResult_t* error) override {
    const std::shared_ptr<FakeComm> found = find(comm, "comm_get_async_error");
    if (found == nullptr) return ncclInvalidArgument;
    *error = found->async_error != ncclSuccess ? found->async_error.load()
             : found->is_ready                 ? ncclSuccess
                                               : ncclInProgress;
    return ncclSuccess;
  }
  ncclResult_t comm_finalize(ncclComm_t comm) override {
    const std::shared_ptr<FakeComm> found = find(comm, "comm_finalize");
    if (found == nullptr) return ncclInvalidArgument;
    const std::lock_guard<std::mutex> lock(found->mutex);
    if (found->num_run != found->num_launched) network_->add_fault("finalized while in use");
    return result_of("comm_finalize");
  }
  ncclResult_t comm_destroy(ncclComm_t comm) override { return end(comm, "comm_destroy"); }
  ncclResult_t comm_abort(ncclComm_t comm) override { return end(comm, "comm_abort"); }

  ncclResult_t group_start() override {
    count("group_start");
    ++group_depth_;
    return result_of("group_start");
  }
  ncclResult_t group_end() override {
    count("group_end");
    if (--group_depth_ > 0) return ncclSuccess;
    std::vector<Pending> pending = std::exchange(pending_, {});
    if (const ncclResult_t result = result_of("group_end"); result != ncclSuccess) return result;
    std::vector<FakeCall> calls;
    for (const Pending& one : pending) {
      if (one.comm != pending.front().comm || one.stream != pending.front().stream) {
        network_->add_fault("a group over several communicators or streams");
      }
      calls.push_back(one.call);
    }
    if (!calls.empty()) launch(pending.front().comm, std::move(calls), pending.front().stream);
    return ncclSuccess;
  }
  ncclResult_t all_gather(const void* send, void* receive, size_t send_count, ncclDataType_t type,
                          ncclComm_t comm, cudaStream_t stream) override {
    return call("all_gather", {FakeCall::Kind::kAllGather, send, receive, send_count, type}, comm,
                stream);
  }
  ncclResult_t reduce_scatter(const void* send, void* receive, size_t receive_count,
                              ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) override {
    return call("reduce_scatter",
                {FakeCall::Kind::kReduceScatter, send, receive, receive_count, type}, comm, stream);
  }
  ncclResult_t all_reduce(const void* send, void* receive, size_t count_of, ncclDataType_t type,
                          ncclComm_t comm, cudaStream_t stream) override {
    return call("all_reduce", {FakeCall::Kind::kAllReduce, send, receive, count_of, type}, comm,
                stream);
  }
  std::string error_string(ncclResult_t result) override {
    return result == ncclRemoteError ? "remote process exited or there was a network error"
                                     : "result " + std::to_string(result);
  }
  std::string last_error(ncclComm_t /*comm*/) override { return {}; }

 private:
  struct UnderWay {
    std::atomic<int> now = 0;
    std::atomic<int> most = 0;
  };
  struct Pending {
    std::shared_ptr<FakeComm> comm;
    FakeCall call;
    cudaStream_t stream;
  };

  void count(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[name];
  }
  [[nodiscard]] ncclResult_t result_of(const std::string& call) const {
    const auto found = failing_.find(call);
    return found == failing_.end() ? ncclSuccess : found->second;
  }
  [[nodiscard]] std::shared_ptr<FakeComm> find(ncclComm_t comm, const char* call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = comms_.find(comm);
    if (found != comms_.end()) return found->second;
    network_->add_fault(std::string(call) + " of a communicator that has ended");
    return nullptr;
  }

  ncclResult_t start(ncclComm_t* comm, const std::string& key, int size, int rank,
                     bool is_blocking) {
    auto made = std::make_shared<FakeComm>();
    made->key = key;
    made->members = network_->rendezvous(key, size);
    made->rank = rank;
    *comm = reinterpret_cast<ncclComm_t>(made.get());
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      comms_.emplace(*comm, made);
    }
    ++network_->num_live_comms;
    if (!is_blocking) {
      made->is_ready = false;
      // NCCL's own thread.
      cuda_->on_stream(own_stream(), [made, stalls = stalls_starts_] {
        if (!stalls && made->members->meet(made->rank, nullptr, made->is_aborted)) {
          made->is_ready = true;
        }
      });
      return ncclInProgress;
    }
    (void)made->members->meet(rank, nullptr, made->is_aborted);
    return ncclSuccess;
  }

  cudaStream_t own_stream() {
    if (own_stream_ == nullptr) own_stream_ = cuda_->pool_stream(0, false);
    return own_stream_;
  }

  ncclResult_t end(ncclComm_t comm, const char* call) {
    const std::shared_ptr<FakeComm> ended = find(comm, call);
    if (ended == nullptr) return ncclInvalidArgument;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      comms_.erase(comm);
    }
    --network_->num_live_comms;
    ended->is_aborted = true;
    ended->members->notify();
    {
      const std::lock_guard<std::mutex> lock(ended->mutex);
      ended->turn_came.notify_all();
    }
    return ncclSuccess;
  }

  ncclResult_t call(const char* name, const FakeCall& made, ncclComm_t comm, cudaStream_t stream) {
    count(name);
    const std::shared_ptr<FakeComm> found = find(comm, name);
    if (found == nullptr) return ncclInvalidArgument;
    if (const ncclResult_t result = result_of(name); result != ncclSuccess) return result;
    if (group_depth_ > 0) {
      pending_.push_back({found, made, stream});
    } else {
      launch(found, {made}, stream);
    }
    return ncclSuccess;
  }

  void launch(const std::shared_ptr<FakeComm>& comm, std::vector<FakeCall> calls,
              cudaStream_t stream) {
    count("launch");
    const int64_t turn = comm->num_launched++;
    // It may run when this is gone.
    cuda_->on_stream(
        stream, [network = network_, under_way = under_way_, comm, turn, calls = std::move(calls)] {
          const int now = ++under_way->now;
          for (int most = under_way->most; now > most;) {
            if (under_way->most.compare_exchange_weak(most, now)) break;
          }
          {
            std::unique_lock<std::mutex> lock(comm->mutex);
            comm->turn_came.wait(lock, [&] { return comm->num_run == turn || comm->is_aborted; });
          }
          if (!comm->is_aborted) run(*network, *comm, calls);
          const std::lock_guard<std::mutex> lock(comm->mutex);
          ++comm->num_run;
          comm->turn_came.notify_all();
          --under_way->now;
        });
  }

  // On the stream.
  static void run(FakeNetwork& network, FakeComm& comm, const std::vector<FakeCall>& calls) {
    FakeRendezvous& members = *comm.members;
    if (!members.meet(comm.rank, &calls, comm.is_aborted)) return;
    std::string difference;
    for (int other = 0; other < members.size() && difference.empty(); ++other) {
      difference = compare(calls, members.calls_of(other));
    }
    if (!difference.empty()) {  // on every member: what all bring is not the same
      members.stay_until_all_have_come();
      network.add_fault(comm.key + ": " + difference);
      return members.wait_for_abort(comm.is_aborted);
    }
    std::vector<at::Tensor> sums;
    for (size_t i = 0; i < calls.size(); ++i) sums.push_back(read(comm, i, calls[i]));
    members.stay_until_all_have_come();
    for (size_t i = 0; i < calls.size(); ++i) {
      if (sums[i].defined())
        tensor(calls[i].receive, sums[i].numel(), calls[i].type).copy_(sums[i]);
    }
    // A peer's next operation may write what this one has read.
    members.stay_until_all_have_come();
  }

  // Gathers at once; gives what is to be written when all have read.
  static at::Tensor read(const FakeComm& comm, size_t index, const FakeCall& call) {
    const auto count_of = static_cast<int64_t>(call.count);
    std::vector<at::Tensor> pieces;
    for (int other = 0; other < comm.members->size(); ++other) {
      const FakeCall& theirs = comm.members->calls_of(other)[index];
      const bool is_scatter = call.kind == FakeCall::Kind::kReduceScatter;
      const at::Tensor sent =
          tensor(const_cast<void*>(theirs.send),
                 is_scatter ? count_of * comm.members->size() : count_of, call.type);
      pieces.push_back(is_scatter ? sent.narrow(0, count_of * comm.rank, count_of) : sent);
    }
    if (call.kind != FakeCall::Kind::kAllGather) {
      at::Tensor sum = at::empty_like(pieces.front());
      sum_in_order(sum, pieces);
      return sum;
    }
    const at::Tensor to = tensor(call.receive, count_of * comm.members->size(), call.type);
    for (int other = 0; other < comm.members->size(); ++other) {
      const at::Tensor place = to.narrow(0, count_of * other, count_of);
      const at::Tensor& from = pieces[static_cast<size_t>(other)];
      if (place.const_data_ptr() != from.const_data_ptr()) place.copy_(from);
    }
    return {};
  }

  static at::Tensor tensor(void* data, int64_t numel, ncclDataType_t type) {
    const std::map<ncclDataType_t, at::ScalarType> types = {
        {ncclFloat32, at::kFloat},  {ncclBfloat16, at::kBFloat16}, {ncclFloat16, at::kHalf},
        {ncclFloat64, at::kDouble}, {ncclInt64, at::kLong},        {ncclUint8, at::kByte}};
    return at::from_blob(data, {numel}, types.at(type));
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

  const std::shared_ptr<FakeNetwork> network_;
  const std::shared_ptr<FakeCuda> cuda_;
  int version_ = NCCL_VERSION_CODE;
  bool has_split_ = true;
  bool stalls_starts_ = false;
  std::map<std::string, ncclResult_t> failing_;
  int group_depth_ = 0;
  std::vector<Pending> pending_;
  cudaStream_t own_stream_ = nullptr;
  const std::shared_ptr<UnderWay> under_way_ = std::make_shared<UnderWay>();
  std::mutex mutex_;
  // Guarded by mutex_.
  std::map<ncclComm_t, std::shared_ptr<FakeComm>> comms_;
  std::map<std::string, int> counts_;
};

}  // namespace mics::testing
