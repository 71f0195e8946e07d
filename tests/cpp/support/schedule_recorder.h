// ScheduleRecorder: streams and communicators of one rank, watched by a race detector that keeps
// its trace and is told of every allocation and free. Nothing moves between ranks.
//
// Streams run what they are given at once. Only events order them, not the order in which the host
// issued the work.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "mics/communicator.h"
#include "mics/flight_log.h"
#include "mics/race_detector.h"
#include "mics/runtime_streams.h"
#include "support/poisoned_memory.h"

namespace mics::testing {

// The latest one that lives is told of memory. While it lives, no other thread uses torch.
class ScheduleRecorder {
 public:
  ScheduleRecorder() {
    PoisoningAllocator::watch([detector = detector_](void* data, size_t nbytes, bool is_given_out) {
      const auto address = reinterpret_cast<uintptr_t>(data);
      if (!is_given_out) return detector->free(address);
      detector->allocate(address, static_cast<int64_t>(nbytes), std::nullopt);
    });
  }
  ~ScheduleRecorder() { PoisoningAllocator::watch(nullptr); }
  ScheduleRecorder(const ScheduleRecorder&) = delete;
  ScheduleRecorder& operator=(const ScheduleRecorder&) = delete;

  [[nodiscard]] std::shared_ptr<RuntimeStreams> make_streams();
  // Moves no shard and no gradient; operations go into log().
  [[nodiscard]] std::unique_ptr<Communicator> make_communicator(GroupInfo group);
  // The first race; empty: every two conflicting accesses are ordered.
  [[nodiscard]] std::string race() const {
    const std::vector<std::string> races = detector_->races();
    return races.empty() ? std::string() : races.front();
  }
  [[nodiscard]] const RaceDetector& detector() const { return *detector_; }
  [[nodiscard]] const FlightLog& log() const { return *log_; }

 private:
  const PoisonedMemory memory_;
  const std::shared_ptr<RaceDetector> detector_ =
      std::make_shared<RaceDetector>(/*keeps_trace=*/true, /*throws=*/false);
  const std::shared_ptr<FlightLog> log_ = std::make_shared<FlightLog>(1 << 16);
};

class RecordingCommunicator final : public Communicator {
 public:
  explicit RecordingCommunicator(GroupInfo group) : Communicator(std::move(group)) {}
  void barrier() override {}

 protected:
  Route gather_route() const override { return Route::kDirect; }
  void do_all_gather(const std::vector<TensorPair>& /*pairs*/) override {}
  void do_reduce_scatter(const std::vector<TensorPair>& /*pairs*/) override {}
  // Whole numbers are what ranks agree by: as if all had written the same.
  void do_all_reduce(const at::Tensor& tensor) override {
    if (tensor.scalar_type() != at::kLong) return;
    auto* numbers = tensor.mutable_data_ptr<int64_t>();
    for (int64_t i = 0; i < tensor.numel(); ++i) numbers[i] *= group().size();
  }
};

inline std::shared_ptr<RuntimeStreams> ScheduleRecorder::make_streams() {
  std::shared_ptr<RuntimeStreams> streams = make_inline_streams();
  streams->frees_in_compute_order = true;  // as on a device
  const std::pair<Stream*, const char*> all[] = {
      {streams->compute.get(), "compute"},           {streams->gather_rail.get(), "gather_rail"},
      {streams->gather_intra.get(), "gather_intra"}, {streams->reduce_intra.get(), "reduce_intra"},
      {streams->reduce_rail.get(), "reduce_rail"},   {streams->replicate.get(), "replicate"}};
  for (const auto& [stream, name] : all) {
    detector_->add_stream(*stream, name, stream == streams->compute.get());
    stream->set_observer(detector_);
  }
  return streams;
}

inline std::unique_ptr<Communicator> ScheduleRecorder::make_communicator(GroupInfo group) {
  auto made = std::make_unique<RecordingCommunicator>(std::move(group));
  made->set_flight_log(log_);
  return made;
}

}  // namespace mics::testing
