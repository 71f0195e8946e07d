#include "comm/nccl/library.h"
#include "comm/nccl/nccl_api.h"

namespace mics {

namespace {

class LoadedNccl final : public NcclApi {
 public:
  LoadedNccl() : library_("NCCL", {"libnccl.so.2"}) {
    library_.get(get_version_, "ncclGetVersion");
    library_.get(get_unique_id_, "ncclGetUniqueId");
    library_.get(comm_init_rank_config_, "ncclCommInitRankConfig");
    library_.get_optional(comm_split_, "ncclCommSplit");
    library_.get(comm_get_async_error_, "ncclCommGetAsyncError");
    library_.get(comm_finalize_, "ncclCommFinalize");
    library_.get(comm_destroy_, "ncclCommDestroy");
    library_.get(comm_abort_, "ncclCommAbort");
    library_.get(group_start_, "ncclGroupStart");
    library_.get(group_end_, "ncclGroupEnd");
    library_.get(all_gather_, "ncclAllGather");
    library_.get(reduce_scatter_, "ncclReduceScatter");
    library_.get(all_reduce_, "ncclAllReduce");
    library_.get(get_error_string_, "ncclGetErrorString");
    library_.get(get_last_error_, "ncclGetLastError");
  }

  ncclResult_t get_version(int* version) override { return get_version_(version); }
  ncclResult_t get_unique_id(ncclUniqueId* id) override { return get_unique_id_(id); }
  ncclResult_t comm_init_rank_config(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                     ncclConfig_t* config) override {
    return comm_init_rank_config_(comm, size, id, rank, config);
  }
  bool has_comm_split() const override { return comm_split_ != nullptr; }
  ncclResult_t comm_split(ncclComm_t comm, int color, int key, ncclComm_t* made,
                          ncclConfig_t* config) override {
    return comm_split_(comm, color, key, made, config);
  }
  ncclResult_t comm_get_async_error(ncclComm_t comm, ncclResult_t* error) override {
    return comm_get_async_error_(comm, error);
  }
  ncclResult_t comm_finalize(ncclComm_t comm) override { return comm_finalize_(comm); }
  ncclResult_t comm_destroy(ncclComm_t comm) override { return comm_destroy_(comm); }
  ncclResult_t comm_abort(ncclComm_t comm) override { return comm_abort_(comm); }
  ncclResult_t group_start() override { return group_start_(); }
  ncclResult_t group_end() override { return group_end_(); }
  ncclResult_t all_gather(const void* send, void* receive, size_t send_count, ncclDataType_t type,
                          ncclComm_t comm, cudaStream_t stream) override {
    return all_gather_(send, receive, send_count, type, comm, stream);
  }
  ncclResult_t reduce_scatter(const void* send, void* receive, size_t receive_count,
                              ncclDataType_t type, ncclComm_t comm, cudaStream_t stream) override {
    return reduce_scatter_(send, receive, receive_count, type, ncclSum, comm, stream);
  }
  ncclResult_t all_reduce(const void* send, void* receive, size_t count, ncclDataType_t type,
                          ncclComm_t comm, cudaStream_t stream) override {
    return all_reduce_(send, receive, count, type, ncclSum, comm, stream);
  }
  std::string error_string(ncclResult_t result) override { return get_error_string_(result); }
  std::string last_error(ncclComm_t comm) override {
    const char* text = get_last_error_(comm);
    return text == nullptr ? "" : text;
  }

 private:
  const Library library_;
  decltype(&ncclGetVersion) get_version_ = nullptr;
  decltype(&ncclGetUniqueId) get_unique_id_ = nullptr;
  decltype(&ncclCommInitRankConfig) comm_init_rank_config_ = nullptr;
  decltype(&ncclCommSplit) comm_split_ = nullptr;
  decltype(&ncclCommGetAsyncError) comm_get_async_error_ = nullptr;
  decltype(&ncclCommFinalize) comm_finalize_ = nullptr;
  decltype(&ncclCommDestroy) comm_destroy_ = nullptr;
  decltype(&ncclCommAbort) comm_abort_ = nullptr;
  decltype(&ncclGroupStart) group_start_ = nullptr;
  decltype(&ncclGroupEnd) group_end_ = nullptr;
  decltype(&ncclAllGather) all_gather_ = nullptr;
  decltype(&ncclReduceScatter) reduce_scatter_ = nullptr;
  decltype(&ncclAllReduce) all_reduce_ = nullptr;
  decltype(&ncclGetErrorString) get_error_string_ = nullptr;
  decltype(&ncclGetLastError) get_last_error_ = nullptr;
};

}  // namespace

std::shared_ptr<NcclApi> load_nccl() { return std::make_shared<LoadedNccl>(); }

}  // namespace mics
