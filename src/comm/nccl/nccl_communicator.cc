#include "comm/nccl/nccl_communicator.h"

#include <ATen/ops/zeros.h>
#include <unistd.h>

#include <utility>

#include "mics/error.h"
#include "plan/check.h"

namespace mics {

namespace {

ncclDataType_t type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ncclFloat32;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kHalf:
      return ncclFloat16;
    case at::kDouble:
      return ncclFloat64;
    case at::kLong:
      return ncclInt64;
    default:
      return ncclUint8;  // gathers move bytes
  }
}

size_t count_of(const at::Tensor& tensor, ncclDataType_t type) {
  return type == ncclUint8 ? tensor.nbytes() : static_cast<size_t>(tensor.numel());
}

}  // namespace

NcclCommunicator::NcclCommunicator(GroupInfo group, Shared shared,
                                   std::shared_ptr<NcclHandle> handle,
                                   std::shared_ptr<InFlight> in_flight)
    : Communicator(std::move(group)),
      shared_(std::move(shared)),
      handle_(std::move(handle)),
      in_flight_(std::move(in_flight)),
      process_(getpid()) {}

// Tensors of finished operations go with their user.
NcclCommunicator::~NcclCommunicator() {
  if (process_ != getpid()) return;
  try {
    release_finished();
  } catch (const Error&) {  // of the device: whoever waits for it next is told
  }
}

void NcclCommunicator::check_process() const {
  if (process_ == getpid()) return;
  throw CommError(
      "a process must use the communicators that it made itself: this one is of the process that "
      "forked this one. Make processes by spawn, or fork before the model is sharded.");
}

void NcclCommunicator::check_tensor(const at::Tensor& tensor) const {
  const c10::Device device = shared_.context->cuda->tensor_device(shared_.context->device);
  MICS_CHECK(tensor.device() == device,
             "NCCL carries tensors of its rank's device: got a tensor on ", tensor.device(),
             ", device=", device, " (", group().name, "). Move the module before it is sharded.");
}

void NcclCommunicator::submit(Stream& stream, std::string_view op, std::string_view unit,
                              int64_t nbytes, std::function<void()> work) {
  check_process();
  const CudaContext& context = *shared_.context;
  context.failure->rethrow_if_set();
  const std::shared_ptr<FlightLog>& log = flight_log();
  LaunchedOperation* operation = nullptr;
  try {
    in_flight_->reclaim();
    operation = &in_flight_->begin(describe(op, unit, nbytes, std::move(work)));
    launch_on(stream, *operation);
  } catch (...) {
    if (log != nullptr && operation != nullptr) log->fail(operation->log_id);
    // Its peers wait for it, so the world ends. Throws the first failure, which may be another one.
    shared_.watchdog->fail(std::current_exception(), log.get());
    context.failure->rethrow_if_set();
  }
  shared_.order->note(stream_, operation->end);
  in_flight_->launched(*operation);
}

void NcclCommunicator::launch_on(Stream& stream, LaunchedOperation& operation) {
  const CudaContext& context = *shared_.context;
  const NcclHandle::Use use(*handle_);  // no abort until the launch is over
  comm_ = use.comm();
  context.failure->rethrow_if_set();  // a failure may have ended it before it was read
  if (comm_ == nullptr) {
    throw CommError("a communicator must not be used after close(): got " + operation.what + " (" +
                    handle_->where() + ").");
  }
  stream_ = cuda_stream_of(stream).handle();
  shared_.order->order(*context.cuda, stream_);
  check_cuda(*context.cuda, context.cuda->event_record(operation.start.get(), stream_),
             "cudaEventRecord");
  operation.work();
  check_cuda(*context.cuda, context.cuda->event_record(operation.end.get(), stream_),
             "cudaEventRecord");
}

LaunchedOperation NcclCommunicator::describe(std::string_view op, std::string_view unit,
                                             int64_t nbytes, std::function<void()> work) {
  LaunchedOperation described;
  described.what = std::string(op);
  if (!unit.empty()) described.what.append(" of unit \"").append(unit).append("\"");
  described.number = ++num_launched_;
  described.log = flight_log();
  if (described.log != nullptr)
    described.log_id = described.log->issue(log_name(), op, unit, nbytes);
  described.start = shared_.context->events->take();
  described.end = shared_.context->events->take();
  described.work = std::move(work);
  return described;
}

void NcclCommunicator::check(ncclResult_t result, const char* call) {
  if (result == ncclSuccess) return;
  handle_->finish(result, call, std::chrono::steady_clock::now() + shared_.timeout);
}

template <typename Call>
void NcclCommunicator::launch(const std::vector<TensorPair>& pairs, const char* name,
                              const Call& call) {
  const bool is_group = pairs.size() > 1;
  if (is_group) check(shared_.nccl->group_start(), "ncclGroupStart");
  for (const TensorPair& pair : pairs) {
    if (pair.output.numel() == 0) continue;
    const ncclResult_t result = call(pair);
    if (is_group && result == ncclInProgress) continue;  // until the group's end
    if (is_group && result != ncclSuccess) {
      (void)shared_.nccl->group_end();  // an open group would take in this thread's later calls
    }
    check(result, name);
  }
  if (is_group) check(shared_.nccl->group_end(), "ncclGroupEnd");
}

void NcclCommunicator::do_all_gather(const std::vector<TensorPair>& pairs) {
  launch(pairs, "ncclAllGather", [&](const TensorPair& pair) {
    const ncclDataType_t type = type_of(pair.input);
    return shared_.nccl->all_gather(pair.input.const_data_ptr(), pair.output.mutable_data_ptr(),
                                    count_of(pair.input, type), type, comm_, stream_);
  });
}

void NcclCommunicator::do_reduce_scatter(const std::vector<TensorPair>& pairs) {
  launch(pairs, "ncclReduceScatter", [&](const TensorPair& pair) {
    return shared_.nccl->reduce_scatter(pair.input.const_data_ptr(), pair.output.mutable_data_ptr(),
                                        static_cast<size_t>(pair.output.numel()),
                                        type_of(pair.input), comm_, stream_);
  });
}

void NcclCommunicator::do_all_reduce(const at::Tensor& tensor) {
  check(shared_.nccl->all_reduce(tensor.const_data_ptr(), tensor.mutable_data_ptr(),
                                 static_cast<size_t>(tensor.numel()), type_of(tensor), comm_,
                                 stream_),
        "ncclAllReduce");
}

std::shared_ptr<void> NcclCommunicator::register_memory(const at::Tensor& memory) {
  check_process();
  shared_.context->failure->rethrow_if_set();
  try {
    return shared_.memory->register_with(handle_, memory);
  } catch (...) {
    // Its peers may wait for it, so the world ends.
    shared_.watchdog->fail(std::current_exception(), flight_log().get());
    shared_.context->failure->rethrow_if_set();
  }
  return nullptr;
}

void NcclCommunicator::barrier() {
  const c10::Device device = shared_.context->cuda->tensor_device(shared_.context->device);
  const std::unique_ptr<Stream> stream = make_caller_stream();
  all_reduce(at::zeros({1}, at::TensorOptions().dtype(at::kLong).device(device)), *stream,
             "barrier");
  stream->synchronize();
}

}  // namespace mics
