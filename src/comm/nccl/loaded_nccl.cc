#include "comm/nccl/library.h"
#include "comm/nccl/nccl_api.h"

namespace mics {

namespace {

constexpr int kFirstGroupAbort = 22200;
constexpr int kFirstWindows = 22807;
constexpr int kSymmetric = 1;  // NCCL_WIN_COLL_SYMMETRIC, which older headers lack

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
    library_.get_optional(mem_alloc_, "ncclMemAlloc");
    library_.get_optional(mem_free_, "ncclMemFree");
    library_.get_optional(comm_register_, "ncclCommRegister");
    library_.get_optional(comm_deregister_, "ncclCommDeregister");
    library_.get_optional(comm_window_register_, "ncclCommWindowRegister");
    library_.get_optional(comm_window_deregister_, "ncclCommWindowDeregister");
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
  bool has_group_abort() const override { return is_from(kFirstGroupAbort); }
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
  bool has_registration() const override {
    return mem_alloc_ != nullptr && mem_free_ != nullptr && comm_register_ != nullptr &&
           comm_deregister_ != nullptr;
  }
  ncclResult_t mem_alloc(void** memory, size_t nbytes) override {
    return mem_alloc_(memory, nbytes);
  }
  ncclResult_t mem_free(void* memory) override { return mem_free_(memory); }
  ncclResult_t comm_register(ncclComm_t comm, void* memory, size_t nbytes, void** handle) override {
    return comm_register_(comm, memory, nbytes, handle);
  }
  ncclResult_t comm_deregister(ncclComm_t comm, void* handle) override {
    return comm_deregister_(comm, handle);
  }
  bool has_windows() const override {
    return has_registration() && comm_window_register_ != nullptr &&
           comm_window_deregister_ != nullptr && is_from(kFirstWindows);
  }
  ncclResult_t comm_window_register(ncclComm_t comm, void* memory, size_t nbytes,
                                    void** window) override {
    return comm_window_register_(comm, memory, nbytes, window, kSymmetric);
  }
  ncclResult_t comm_window_deregister(ncclComm_t comm, void* window) override {
    return comm_window_deregister_(comm, window);
  }
  std::string error_string(ncclResult_t result) override { return get_error_string_(result); }
  std::string last_error(ncclComm_t comm) override {
    const char* text = get_last_error_(comm);
    return text == nullptr ? "" : text;
  }

 private:
  // The library is of `version` or newer.
  [[nodiscard]] bool is_from(int version) const {
    int loaded = 0;
    return get_version_(&loaded) == ncclSuccess && loaded >= version;
  }

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
  // Their types are spelled out, as older headers lack them: a window is a pointer.
  ncclResult_t (*mem_alloc_)(void**, size_t) = nullptr;
  ncclResult_t (*mem_free_)(void*) = nullptr;
  ncclResult_t (*comm_register_)(ncclComm_t, void*, size_t, void**) = nullptr;
  ncclResult_t (*comm_deregister_)(ncclComm_t, void*) = nullptr;
  ncclResult_t (*comm_window_register_)(ncclComm_t, void*, size_t, void**, int) = nullptr;
  ncclResult_t (*comm_window_deregister_)(ncclComm_t, void*) = nullptr;
  decltype(&ncclGetErrorString) get_error_string_ = nullptr;
  decltype(&ncclGetLastError) get_last_error_ = nullptr;
};

}  // namespace

std::shared_ptr<NcclApi> load_nccl() { return std::make_shared<LoadedNccl>(); }

}  // namespace mics
