// NcclWorld: this rank's NCCL communicators and CUDA streams, and the watchdog over them. The
// production backend.
//
//   auto world = NcclWorld::create(store, options);    // on every rank, once the device is set
//   auto gather = world->make_communicator(group);     // on every member, in the same order
//   auto stream = world->make_stream(/*high_priority=*/true);
//   gather->all_gather(output, input, *stream);        // launched; the host does not wait
//   world->close(patience);                            // on every rank, before the process ends
//
// Launches: an operation is launched on the stream by the calling thread, one NCCL group for all
// its pairs. All ranks launch in the same order over all communicators. At most `max_in_flight` of a
// direction are in flight, kept by events between streams; the host never waits.
// Sums: of NCCL, in the tensors' dtype and in the order of its algorithm; everything else is as
// communicator.h says.
// Memory: tensors of an operation are released by a later call on the same communicator, on the
// calling thread, once the operation is done.
// Ends: destroying a communicator ends nothing, because ranks destroy theirs when they like and an
// end is NCCL's on all. The next one of its name and members uses it again, once all members have
// let go of it with nothing in flight. All end in close(), which every rank calls at the same point;
// else, by abort, with the last of the world and its communicators.
// Failures: an error of NCCL, or an operation that is overdue, ends all communicators of the rank,
// and through the Store those of all ranks. The next launch or wait throws what went wrong, with the
// table of all ranks where there is a flight log. The world cannot be used again. All are aborted in
// one NCCL group where the library has that (2.22), and not before a launch on another thread has
// left NCCL, unless it stays there longer than `launch_patience`.
//
// Thread safety: one thread at a time, close() included; the watchdog is a thread of its own.
#pragma once

#include <c10/util/intrusive_ptr.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mics/communicator.h"
#include "mics/nccl_options.h"
#include "mics/stream.h"

namespace c10d {
class Store;
}

namespace mics {

class CudaApi;
class NcclApi;

// What is installed; for reports.
struct NcclVersions {
  int header = 0;        // as NCCL_VERSION_CODE; 0: built without NCCL's headers
  int library = 0;       // 0: none could be loaded
  int cuda_header = 0;   // as CUDART_VERSION
  int cuda_runtime = 0;  // 0: none could be loaded
  int num_devices = 0;
  std::string problem;  // why a CUDA world cannot be made; empty: it can
};
[[nodiscard]] NcclVersions nccl_versions();

// What a communicator carries. NcclOptions::max_in_flight counts each direction by itself.
enum class NcclDirection { kGather, kReduce, kReplicate };
inline constexpr size_t kNumDirections = 3;

class NcclWorld {
 public:
  // With the libraries that torch has loaded. `store` is that of this session alone (a
  // PrefixStore). Every rank calls it. Throws Error when a library, a device or the header at build
  // is missing; InvalidArgument, on every rank, when ranks differ in NCCL's version or in options
  // that must agree, or share a device; TimeoutError that names the ranks that did not call it.
  [[nodiscard]] static std::shared_ptr<NcclWorld> create(
      const c10::intrusive_ptr<c10d::Store>& store, const NcclOptions& options);
  // With the given libraries; for tests.
  [[nodiscard]] static std::shared_ptr<NcclWorld> create(
      const c10::intrusive_ptr<c10d::Store>& store, const NcclOptions& options,
      std::shared_ptr<CudaApi> cuda, std::shared_ptr<NcclApi> nccl);
  virtual ~NcclWorld() = default;
  NcclWorld(const NcclWorld&) = delete;
  NcclWorld& operator=(const NcclWorld&) = delete;

  // Every member calls it. Throws TimeoutError that names the members that did not, and CommError.
  // The communicator may outlive the world. `only_gathers`: it carries nothing else, so that
  // NcclOptions::copy_engine can apply.
  [[nodiscard]] virtual std::unique_ptr<Communicator> make_communicator(
      GroupInfo group, NcclDirection direction = NcclDirection::kGather,
      bool only_gathers = false) = 0;
  // A stream of torch's pool.
  [[nodiscard]] virtual std::unique_ptr<Stream> make_stream(bool high_priority) = 0;
  // Whatever stream is torch's current one when it is used: the caller's compute.
  [[nodiscard]] virtual std::unique_ptr<Stream> make_current_stream() = 0;

  // Waits for operations in flight, `patience` at most, closes all communicators in the order in
  // which they were made, and stops the watchdog. On a failure or a TimeoutError it aborts them and
  // throws. A second call does nothing.
  virtual void close(std::chrono::milliseconds patience) = 0;
  // Memory of ncclMemAlloc that is not freed: what Communicator::allocate() gave. torch does not
  // count it.
  [[nodiscard]] virtual int64_t allocated_nbytes() const = 0;
  // Options that could not be honoured, and settings of the environment that cost speed; for the
  // start-up report.
  [[nodiscard]] virtual std::vector<std::string> notes() const = 0;

 protected:
  NcclWorld() = default;
};

}  // namespace mics
