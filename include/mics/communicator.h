// Communicator: collectives among the ranks of one group. One instance is one total order.
//
// Order:    every member issues the same sequence of calls, with the same sizes and dtypes.
// Stream:   an operation is queued behind the work already on `stream` and completes in its order;
//           the call does not wait for it. Errors of queued work come out of the stream's events;
//           on an inline stream they come out of the call.
// Lifetime: tensors are held until the operation has run; the caller may drop its own references.
// Sums:     local, shm, c10d: in ascending rank order, in fp32 (fp64 for fp64, the type itself for
//           integers), rounded once to the tensors' dtype. nccl: in an order that its algorithm
//           chooses, in the tensors' dtype, rounded at each addition; see sums_in_wire_dtype().
//           There is no average: scaling is the caller's, in fp32.
// Failures: with a flight log, a CommError or TimeoutError ends with what each rank was doing.
// Traffic:  what the backend's algorithm sends and receives, by peer, split by node; see Traffic.
//
// Thread safety: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mics/flight_log.h"
#include "mics/stream.h"

namespace mics {

// Who is in a group, as this rank sees it.
struct GroupInfo {
  std::string name;              // "gather/rail"; in messages and reports
  std::vector<int> world_ranks;  // members, ascending
  std::vector<int> nodes;        // node of each member; same length
  int rank = 0;                  // index of this rank among the members
  [[nodiscard]] int size() const { return static_cast<int>(world_ranks.size()); }
};

// Calls and bytes of one communicator since it was made. A byte to or from a member on another node
// is `inter`, else `intra`. Counted when an operation is issued.
struct Traffic {
  int64_t calls = 0;
  int64_t sent_intra_nbytes = 0;
  int64_t sent_inter_nbytes = 0;
  int64_t received_intra_nbytes = 0;
  int64_t received_inter_nbytes = 0;
};

// One piece of a grouped operation; see all_gather and reduce_scatter.
struct TensorPair {
  at::Tensor output;
  at::Tensor input;
};

class Communicator {
 public:
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  [[nodiscard]] const GroupInfo& group() const { return group_; }
  [[nodiscard]] const Traffic& traffic() const { return traffic_; }

  // Gathers every member's inputs into the outputs, in rank order; all pairs as one launch.
  //
  //   input    [numel]           this rank's piece
  //   output   [size * numel]    rank r's piece at [r * numel, (r+1) * numel)
  //
  // Pairs may differ in numel (0 too) but not in dtype. All tensors contiguous, on one device.
  // Aliasing: input may be output[rank * numel ...]; any other overlap is an error.
  // Throws:   InvalidArgument before anything is queued. CommError, TimeoutError from the stream.
  // Cost:     received: (size - 1) * numel elements per pair. Other copies: none on local; one
  //           staging copy on each side on c10d when there are several pairs.
  // `unit` is for the flight log.
  void all_gather(const std::vector<TensorPair>& pairs, Stream& stream, std::string_view unit = {});
  void all_gather(const at::Tensor& output, const at::Tensor& input, Stream& stream,
                  std::string_view unit = {}) {
    all_gather(std::vector<TensorPair>{{output, input}}, stream, unit);
  }

  // Sums every member's inputs and leaves piece r of the sum at rank r; all pairs as one launch.
  //
  //   input    [size * numel]    piece r at [r * numel, (r+1) * numel)
  //   output   [numel]           the sum of all members' pieces for this rank
  //
  // Dtypes, devices: as all_gather. Aliasing: output may be input[rank * numel ...], which is then
  // overwritten; any other overlap is an error.
  // Throws:   as all_gather.
  // Cost:     sent and received: (size - 1) * numel elements per pair, each to its owner directly.
  void reduce_scatter(const std::vector<TensorPair>& pairs, Stream& stream,
                      std::string_view unit = {});
  void reduce_scatter(const at::Tensor& output, const at::Tensor& input, Stream& stream,
                      std::string_view unit = {}) {
    reduce_scatter(std::vector<TensorPair>{{output, input}}, stream, unit);
  }

  // Replaces `tensor` [numel] by the sum over all members; bitwise equal on every member.
  // Throws:   as all_gather.
  // Cost:     sent and received: 2 * (size - 1) * ceil(numel / size) elements.
  void all_reduce(const at::Tensor& tensor, Stream& stream, std::string_view unit = {});

  // Logs operations. To be called before the first one.
  void set_flight_log(std::shared_ptr<FlightLog> log) { log_ = std::move(log); }

  // For callers that have no stream: on a CPU the calling thread, on a device torch's current
  // stream.
  [[nodiscard]] virtual std::unique_ptr<Stream> make_caller_stream() const {
    return make_inline_stream();
  }

  // Releases the tensors of finished operations now instead of at the next call.
  virtual void release_finished() {}

  // Memory [nbytes], bytes, of the kind that the backend moves fastest; undefined where torch's own
  // is as fast. It may outlive the communicator.
  [[nodiscard]] virtual at::Tensor allocate(int64_t /*nbytes*/) { return {}; }
  // Registers `memory`, which allocate() gave, with the backend until the returned handle is
  // destroyed; null where nothing is registered. Every member calls it, with memory of the same
  // size. Nothing may be in flight at the call, nor when the handle is destroyed.
  [[nodiscard]] virtual std::shared_ptr<void> register_memory(const at::Tensor& /*memory*/) {
    return nullptr;
  }

  // Memory that the backend keeps for moving messages: grows to the largest one.
  [[nodiscard]] virtual int64_t staging_nbytes() const { return 0; }

  // False: what comes from others is undefined, as with torch's fake process group, which is for
  // measuring the host's work.
  [[nodiscard]] virtual bool moves_data() const { return true; }

  // A sum is rounded to the tensors' dtype at each addition, in an order that the backend chooses:
  // in fp16 it may overflow where the mean does not.
  [[nodiscard]] virtual bool sums_in_wire_dtype() const { return false; }

  // Returns when every member has called it.
  virtual void barrier() = 0;

  // Counted as a ring: all pieces come from the member before this one and go to the one after.
  // Else each piece goes straight from member to member. An all-reduce is a reduce-scatter of the
  // sums and an all-gather.
  [[nodiscard]] bool gathers_in_ring() const { return gather_route() == Route::kRing; }
  [[nodiscard]] bool reduces_in_ring() const { return reduce_route() == Route::kRing; }

 protected:
  explicit Communicator(GroupInfo group);

  // Called with valid arguments and size() > 1; the base has handled a group of one.
  virtual void do_all_gather(const std::vector<TensorPair>& pairs) = 0;
  virtual void do_reduce_scatter(const std::vector<TensorPair>& pairs) = 0;
  virtual void do_all_reduce(const at::Tensor& tensor) = 0;

  // How a backend moves pieces, for the counters. kDirect: each goes straight to the member that
  // needs it. kRing: all pass through the next member of the group.
  enum class Route { kDirect, kRing };
  [[nodiscard]] virtual Route gather_route() const = 0;
  [[nodiscard]] virtual Route reduce_route() const { return Route::kDirect; }

  // Throws InvalidArgument for tensors that the backend cannot carry.
  virtual void check_tensor(const at::Tensor& /*tensor*/) const {}

  // Queues `work`, which calls one of the above, and logs it; the log's report is added to what it
  // throws. The base logs it where it runs; a backend whose work only launches overrides this.
  virtual void submit(Stream& stream, std::string_view op, std::string_view unit, int64_t nbytes,
                      std::function<void()> work);
  // May be null.
  [[nodiscard]] const std::shared_ptr<FlightLog>& flight_log() const { return log_; }
  [[nodiscard]] const std::string& log_name() const { return log_name_; }

 private:
  void count(Route route, int64_t nbytes_per_member);
  [[nodiscard]] bool is_same_node(int member) const;
  void check_pairs(const char* op, const std::vector<TensorPair>& pairs,
                   bool output_is_larger) const;

  const GroupInfo group_;
  const std::string log_name_;  // "gather/rail [0 2]"
  Traffic traffic_;
  std::shared_ptr<FlightLog> log_;
};

// The accumulation type of a sum: fp32 for fp32, bf16 and fp16; fp64 for fp64; int64 for int64.
// Throws InvalidArgument for any other dtype.
[[nodiscard]] at::ScalarType accumulation_dtype(at::ScalarType dtype);

// Sums `pieces` in the given order as the class comment says and writes `output`. For backends.
// All contiguous, of one size, dtype and device. `output` may be one of the pieces.
void sum_in_order(const at::Tensor& output, const std::vector<at::Tensor>& pieces);
// The same for pieces [numel] that lie one after the other in `rows` [n * numel].
void sum_rows_in_order(const at::Tensor& output, const at::Tensor& rows);

}  // namespace mics
