// FakeNccl: NCCL between ranks of a FakeNetwork, over FakeCuda, with the semantics of the real one.
//
//   - an operation is queued on a stream and starts when the stream reaches it
//   - one communicator runs its operations one after the other, on whatever streams, in the order
//     of launch
//   - an operation ends when all members have joined it with the same calls, sizes and types. Else
//     it stays, as the real one would, and FakeNetwork::faults() says why
//   - sums are in rank order and in the dtype of the wire; see FakeNetwork::sums_in_fp32
//   - abort ends what waits; a communicator that has ended cannot be used; see fake_nccl_comms.h
//   - a group is of the calling thread
//   - registering memory is a collective, and not beside operations; see fake_nccl_memory.h
#pragma once

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/nccl/nccl_api.h"
#include "support/fake_cuda.h"
#include "support/fake_nccl_comms.h"
#include "support/fake_nccl_memory.h"
#include "support/fake_network.h"

namespace mics::testing {

class FakeNccl final : public NcclApi {
 public:
  FakeNccl(std::shared_ptr<FakeNetwork> network, std::shared_ptr<FakeCuda> cuda)
      : network_(std::move(network)),
        cuda_(std::move(cuda)),
        memory_(network_),
        comms_(network_, memory_) {}

  ~FakeNccl() override {
    while (own_stream_ != nullptr && cuda_->stream_query(own_stream_) == cudaErrorNotReady) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  FakeNccl(const FakeNccl&) = delete;
  FakeNccl& operator=(const FakeNccl&) = delete;

  // --- faults ---

  void set_version(int version) { version_ = version; }
  void set_has_split(bool has_split) { has_split_ = has_split; }
  // The call of this name fails from here on.
  void fail(const std::string& call, ncclResult_t result) { failing_[call] = result; }
  // A start in non-blocking mode does not end.
  void stall_starts() { stalls_starts_ = true; }
  // The call of this name stays inside NCCL for so long.
  void delay(const std::string& call, std::chrono::milliseconds delay) { delays_[call] = delay; }
  // Launches stay inside NCCL until the communicator is aborted.
  void stall_launches() { stalls_launches_ = true; }
  // As a library older than 2.22: aborts inside a group come one after the other.
  void set_has_no_group_abort() {
    has_group_abort_ = false;
    comms_.set_abort_limit(std::chrono::seconds(1));
  }
  // An end does not end, until it is aborted.
  void stall_ends() { stalls_ends_ = true; }
  void set_has_registration(bool has_registration) { has_registration_ = has_registration; }
  void set_has_windows(bool has_windows) { has_windows_ = has_windows; }
  // Windows are null from here on, as on devices that cannot have them.
  void refuse_windows() { gives_windows_ = false; }
  // Of all communicators of this rank, as after a link has failed.
  void set_async_error(ncclResult_t error) {
    for (const std::shared_ptr<FakeComm>& comm : comms_.all()) comm->async_error = error;
  }
  // A thread is in a call with a communicator.
  [[nodiscard]] bool is_inside() const {
    const std::vector<std::shared_ptr<FakeComm>> living = comms_.all();
    return std::any_of(living.begin(), living.end(),
                       [](const auto& comm) { return comm->num_inside > 0; });
  }
  // Operations whose streams had reached them and that were not done, at most.
  [[nodiscard]] int most_under_way() const { return under_way_->most; }
  [[nodiscard]] std::map<std::string, int> take_counts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(counts_, {});
  }

  // --- NcclApi ---

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
    return start(comm, id.internal, size, rank, *config);
  }
  bool has_comm_split() const override { return has_split_; }
  ncclResult_t comm_split(ncclComm_t comm, int color, int key, ncclComm_t* made,
                          ncclConfig_t* config) override {
    count("comm_split");
    const std::shared_ptr<FakeComm> parent = comms_.find(comm, "comm_split");
    if (parent == nullptr) return ncclInvalidArgument;
    if (config->splitShare != 0) network_->add_fault("a split that shares resources");
    if (key != parent->rank) network_->add_fault("a split in another order of ranks");
    return start(made,
                 parent->key + " split " + std::to_string(parent->num_splits++) + " color " +
                     std::to_string(color),
                 parent->members->size(), key, *config);
  }
  ncclResult_t comm_get_async_error(ncclComm_t comm, ncclResult_t* error) override {
    const std::shared_ptr<FakeComm> found = comms_.find(comm, "comm_get_async_error");
    if (found == nullptr) return ncclInvalidArgument;
    *error = found->async_error != ncclSuccess ? found->async_error.load()
             : found->is_ready                 ? ncclSuccess
                                               : ncclInProgress;
    return ncclSuccess;
  }
  ncclResult_t comm_finalize(ncclComm_t comm) override {
    const std::shared_ptr<FakeComm> found = comms_.find(comm, "comm_finalize");
    if (found == nullptr) return ncclInvalidArgument;
    const FakeInside inside(found, delay_of("comm_finalize"));
    const std::lock_guard<std::mutex> lock(found->mutex);
    if (found->num_run != found->num_launched) network_->add_fault("finalized while in use");
    if (!stalls_ends_) return result_of("comm_finalize");
    found->is_ready = false;
    return ncclInProgress;
  }
  ncclResult_t comm_destroy(ncclComm_t comm) override { return comms_.destroy(comm); }
  ncclResult_t comm_abort(ncclComm_t comm) override {
    count("comm_abort");
    if (!has_group_abort_ || group().depth == 0) return comms_.abort({comm});
    group().aborted.push_back(comm);
    return ncclSuccess;
  }
  bool has_group_abort() const override { return has_group_abort_; }

  ncclResult_t group_start() override {
    count("group_start");
    ++group().depth;
    return result_of("group_start");
  }
  ncclResult_t group_end() override {
    count("group_end");
    if (--group().depth > 0) return ncclSuccess;
    Group ended = std::exchange(group(), {});
    std::vector<Pending>& pending = ended.pending;
    if (!ended.aborted.empty()) return comms_.abort(ended.aborted);
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
  bool has_registration() const override { return has_registration_; }
  ncclResult_t mem_alloc(void** memory, size_t nbytes) override {
    count("mem_alloc");
    if (const ncclResult_t result = result_of("mem_alloc"); result != ncclSuccess) return result;
    *memory = memory_.allocate(nbytes);
    return ncclSuccess;
  }
  ncclResult_t mem_free(void* memory) override { return memory_.free(memory); }
  ncclResult_t comm_register(ncclComm_t comm, void* memory, size_t nbytes, void** handle) override {
    return add_registration("comm_register", comm, memory, nbytes, handle, /*is_window=*/false);
  }
  ncclResult_t comm_deregister(ncclComm_t comm, void* handle) override {
    return end_registration("comm_deregister", comm, handle);
  }
  bool has_windows() const override { return has_windows_; }
  ncclResult_t comm_window_register(ncclComm_t comm, void* memory, size_t nbytes,
                                    void** window) override {
    return add_registration("comm_window_register", comm, memory, nbytes, window,
                            /*is_window=*/true);
  }
  ncclResult_t comm_window_deregister(ncclComm_t comm, void* window) override {
    return end_registration("comm_window_deregister", comm, window);
  }
  // Allocations and registrations that have not ended.
  [[nodiscard]] int num_held() const { return memory_.num_held(); }

  std::string error_string(ncclResult_t result) override {
    return result == ncclRemoteError ? "remote process exited or there was a network error"
                                     : "result " + std::to_string(result);
  }
  std::string last_error(ncclComm_t /*comm*/) override { return {}; }

 private:
  struct Pending {
    std::shared_ptr<FakeComm> comm;
    FakeCall call;
    cudaStream_t stream;
  };
  // Of one thread.
  struct Group {
    int depth = 0;
    std::vector<Pending> pending;
    std::vector<ncclComm_t> aborted;
  };
  [[nodiscard]] Group& group() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return groups_[std::this_thread::get_id()];
  }
  void count(const std::string& name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[name];
  }
  [[nodiscard]] std::chrono::milliseconds delay_of(const std::string& call) const {
    const auto found = delays_.find(call);
    return found == delays_.end() ? std::chrono::milliseconds(0) : found->second;
  }
  [[nodiscard]] ncclResult_t result_of(const std::string& call) const {
    const auto found = failing_.find(call);
    return found == failing_.end() ? ncclSuccess : found->second;
  }

  ncclResult_t start(ncclComm_t* comm, const std::string& key, int size, int rank,
                     const ncclConfig_t& config) {
    auto made = std::make_shared<FakeComm>();
    made->key = key;
    made->members = network_->join(key, size, rank);
    made->rank = rank;
    made->cta_policy = config.CTAPolicy;
    if (config.commName != nullptr) made->expected_name = made->name = config.commName;
    made->is_blocking = config.blocking != 0;
    *comm = comms_.add(made);
    if (!made->is_blocking) {
      made->is_ready = false;
      // NCCL's own thread.
      cuda_->on_stream(own_stream(), [made, stalls = stalls_starts_] {
        if (!stalls && made->members->meet(made->rank, made->is_aborted)) made->is_ready = true;
      });
      return ncclInProgress;
    }
    (void)made->members->meet(rank, made->is_aborted);
    return ncclSuccess;
  }

  // A collective of the members, as that of a window is.
  ncclResult_t add_registration(const char* call, ncclComm_t comm, void* memory, size_t nbytes,
                                void** handle, bool is_window) {
    count(call);
    const std::shared_ptr<FakeComm> found = comms_.find(comm, call);
    if (found == nullptr) return ncclInvalidArgument;
    if (const ncclResult_t result = result_of(call); result != ncclSuccess) return result;
    const FakeNcclMemory::Registration made{found, memory, nbytes, is_window};
    if (!memory_.check(made, call)) return ncclInvalidArgument;
    check_idle(*found, call);
    if (found->is_blocking) return meet_and_register(made, handle);
    found->is_ready = false;
    // NCCL's own thread, which writes the handle later.
    cuda_->on_stream(own_stream(), [this, made, handle] {
      if (meet_and_register(made, handle) == ncclSuccess) made.comm->is_ready = true;
    });
    return ncclInProgress;
  }
  ncclResult_t meet_and_register(const FakeNcclMemory::Registration& made, void** handle) {
    FakeCall meeting;
    meeting.kind = FakeCall::Kind::kRegister;
    meeting.count = made.nbytes;
    made.comm->members->run(made.comm->rank, {meeting}, made.comm->is_aborted);
    // After an abort the caller's handle may be gone.
    const std::lock_guard<std::mutex> no_abort(made.comm->mutex);
    if (made.comm->is_aborted) return ncclInternalError;
    *handle = nullptr;
    if (made.is_window && !gives_windows_) return ncclSuccess;
    *handle = memory_.add(made);
    return ncclSuccess;
  }
  ncclResult_t end_registration(const char* call, ncclComm_t comm, void* handle) {
    count(call);
    const std::shared_ptr<FakeComm> found = comms_.find(comm, call);
    if (found == nullptr) return ncclInvalidArgument;
    check_idle(*found, call);
    return memory_.remove(handle);
  }
  void check_idle(FakeComm& comm, const char* call) {
    const std::lock_guard<std::mutex> lock(comm.mutex);
    if (comm.num_run != comm.num_launched) {
      network_->add_fault(std::string(call) + " beside operations");
    }
  }
  cudaStream_t own_stream() {
    if (own_stream_ == nullptr) own_stream_ = cuda_->pool_stream(0, false);
    return own_stream_;
  }

  ncclResult_t call(const char* name, const FakeCall& made, ncclComm_t comm, cudaStream_t stream) {
    count(name);
    const std::shared_ptr<FakeComm> found = comms_.find(comm, name);
    if (found == nullptr) return ncclInvalidArgument;
    const FakeInside inside(found, delay_of(name));
    if (const ncclResult_t result = result_of(name); result != ncclSuccess) return result;
    if (group().depth > 0) {
      group().pending.push_back({found, made, stream});
    } else {
      launch(found, {made}, stream);
    }
    return ncclSuccess;
  }

  void launch(const std::shared_ptr<FakeComm>& comm, std::vector<FakeCall> calls,
              cudaStream_t stream) {
    count("launch");
    const FakeInside inside(comm, delay_of("launch"));
    if (stalls_launches_) {
      comm->is_stuck = true;
      std::unique_lock<std::mutex> lock(comm->mutex);
      comm->turn_came.wait(lock, [&] { return comm->is_aborted.load(); });
      return;
    }
    note_memory(*comm, calls);
    const int64_t turn = [&] {
      const std::lock_guard<std::mutex> lock(comm->mutex);
      return comm->num_launched++;
    }();
    // It may run when this is gone.
    cuda_->on_stream(stream, [under_way = under_way_, comm, turn, calls = std::move(calls)] {
      under_way->begin();
      ++comm->num_running;
      {
        std::unique_lock<std::mutex> lock(comm->mutex);
        comm->turn_came.wait(lock, [&] { return comm->num_run == turn || comm->is_aborted; });
      }
      if (!comm->is_aborted) comm->members->run(comm->rank, calls, comm->is_aborted);
      const std::lock_guard<std::mutex> lock(comm->mutex);
      ++comm->num_run;
      --comm->num_running;
      comm->turn_came.notify_all();
      --under_way->now;
    });
  }

  // Counts what NCCL 2.28 gives to copy engines: gathers from windows to windows, on a communicator
  // that may have no thread blocks.
  void note_memory(const FakeComm& comm, const std::vector<FakeCall>& calls) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const FakeCall& call : calls) {
      if (!memory_.is_in_window(comm, call.receive)) continue;
      ++counts_["into a window"];
      if (call.kind == FakeCall::Kind::kAllGather && comm.cta_policy == NCCL_CTA_POLICY_ZERO &&
          memory_.is_in_window(comm, call.send)) {
        ++counts_["by a copy engine"];
      }
    }
  }

  const std::shared_ptr<FakeNetwork> network_;
  const std::shared_ptr<FakeCuda> cuda_;
  FakeNcclMemory memory_;
  FakeNcclComms comms_;
  int version_ = NCCL_VERSION_CODE;
  bool has_split_ = true;
  bool has_registration_ = true;
  bool has_windows_ = true;
  bool gives_windows_ = true;
  bool stalls_starts_ = false;
  std::atomic<bool> stalls_ends_ = false;
  bool has_group_abort_ = true;
  bool stalls_launches_ = false;
  std::map<std::string, ncclResult_t> failing_;
  std::map<std::string, std::chrono::milliseconds> delays_;
  cudaStream_t own_stream_ = nullptr;
  const std::shared_ptr<FakeUnderWay> under_way_ = std::make_shared<FakeUnderWay>();
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<std::thread::id, Group> groups_;  // each used by its thread alone
  std::map<std::string, int> counts_;
};

}  // namespace mics::testing
