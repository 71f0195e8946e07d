// NcclApi: what this library calls of NCCL, behind an interface: filled from the library that torch
// has loaded (load_nccl), or a fake in tests. One build runs with and without NCCL.
//
// Only src/comm/nccl includes this header. Names are those of NCCL without `nccl`.
// Thread safety: any thread, but one at a time per communicator; comm_abort from any. A group is one
// thread's.
#pragma once

#include <nccl.h>

#include <memory>
#include <string>

namespace mics {

class NcclApi {
 public:
  virtual ~NcclApi() = default;

  // As in NCCL_VERSION_CODE.
  [[nodiscard]] virtual ncclResult_t get_version(int* version) = 0;
  [[nodiscard]] virtual ncclResult_t get_unique_id(ncclUniqueId* id) = 0;
  [[nodiscard]] virtual ncclResult_t comm_init_rank_config(ncclComm_t* comm, int size,
                                                           ncclUniqueId id, int rank,
                                                           ncclConfig_t* config) = 0;
  // False: the library is older than ncclCommSplit (2.18).
  [[nodiscard]] virtual bool has_comm_split() const = 0;
  [[nodiscard]] virtual ncclResult_t comm_split(ncclComm_t comm, int color, int key,
                                                ncclComm_t* made, ncclConfig_t* config) = 0;
  [[nodiscard]] virtual ncclResult_t comm_get_async_error(ncclComm_t comm, ncclResult_t* error) = 0;
  [[nodiscard]] virtual ncclResult_t comm_finalize(ncclComm_t comm) = 0;
  [[nodiscard]] virtual ncclResult_t comm_destroy(ncclComm_t comm) = 0;
  [[nodiscard]] virtual ncclResult_t comm_abort(ncclComm_t comm) = 0;
  // Aborts in one group end together. False: the library is older than 2.22, where each may wait
  // for the device, and so for a collective of a communicator that is still to be aborted.
  [[nodiscard]] virtual bool has_group_abort() const = 0;

  [[nodiscard]] virtual ncclResult_t group_start() = 0;
  [[nodiscard]] virtual ncclResult_t group_end() = 0;
  [[nodiscard]] virtual ncclResult_t all_gather(const void* send, void* receive, size_t send_count,
                                                ncclDataType_t type, ncclComm_t comm,
                                                cudaStream_t stream) = 0;
  // Sums.
  [[nodiscard]] virtual ncclResult_t reduce_scatter(const void* send, void* receive,
                                                    size_t receive_count, ncclDataType_t type,
                                                    ncclComm_t comm, cudaStream_t stream) = 0;
  [[nodiscard]] virtual ncclResult_t all_reduce(const void* send, void* receive, size_t count,
                                                ncclDataType_t type, ncclComm_t comm,
                                                cudaStream_t stream) = 0;

  // Memory that NCCL moves without copies of its own. False: the library is older than 2.19.
  [[nodiscard]] virtual bool has_registration() const = 0;
  [[nodiscard]] virtual ncclResult_t mem_alloc(void** memory, size_t nbytes) = 0;
  [[nodiscard]] virtual ncclResult_t mem_free(void* memory) = 0;
  [[nodiscard]] virtual ncclResult_t comm_register(ncclComm_t comm, void* memory, size_t nbytes,
                                                   void** handle) = 0;
  [[nodiscard]] virtual ncclResult_t comm_deregister(ncclComm_t comm, void* handle) = 0;
  // Symmetric windows. False: the library is older than 2.28.7, whose kernels for them were wrong.
  [[nodiscard]] virtual bool has_windows() const = 0;
  // Collective. Null: the devices cannot have one.
  [[nodiscard]] virtual ncclResult_t comm_window_register(ncclComm_t comm, void* memory,
                                                          size_t nbytes, void** window) = 0;
  [[nodiscard]] virtual ncclResult_t comm_window_deregister(ncclComm_t comm, void* window) = 0;

  [[nodiscard]] virtual std::string error_string(ncclResult_t result) = 0;
  // Of the calling thread's last failed call, in words; may be empty. `comm` may be null.
  [[nodiscard]] virtual std::string last_error(ncclComm_t comm) = 0;
};

// The library that torch has loaded, else libnccl.so.2 by name. Throws Error when there is none, or
// when it lacks an entry point that is needed.
[[nodiscard]] std::shared_ptr<NcclApi> load_nccl();

}  // namespace mics
