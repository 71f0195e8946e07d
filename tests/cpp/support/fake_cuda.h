// FakeCuda: the CUDA calls of one rank on a host without a GPU, with the order of the real ones.
//
// A stream is a FIFO worker thread; an event is a mark in it. Tensors lie on the CPU. What torch
// computes on its current stream has run when the call returns, so waiting there stands still.
// A copy from memory of the host that is not pinned is a synchronisation, and counted as one.
// With a seed, each task on a stream starts after a random delay: an order that only events make
// shows as a wrong result where an event is missing.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "comm/nccl/cuda_api.h"
#include "mics/stream.h"

namespace mics::testing {

class FakeStream {
 public:
  FakeStream(unsigned seed, unsigned max_delay_us)
      : random_(seed), max_delay_us_(seed != 0 ? max_delay_us : 0) {}

  void push(std::function<void()> task) {
    ++num_queued_;
    worker_->enqueue([this, task = std::move(task)]() mutable {
      if (max_delay_us_ > 0) {
        std::this_thread::sleep_for(std::chrono::microseconds(random_() % max_delay_us_));
      }
      task();
      task = nullptr;
      --num_queued_;
    });
  }
  [[nodiscard]] bool is_empty() const { return num_queued_ == 0; }

 private:
  std::minstd_rand random_;  // of the thread
  const unsigned max_delay_us_;
  std::atomic<int> num_queued_ = 0;
  const std::unique_ptr<Stream> worker_ = make_worker_stream();  // last: it uses the members above
};

class FakeCuda final : public CudaApi {
 public:
  explicit FakeCuda(std::string bus_id = "0000:00:1e.0", unsigned seed = 0,
                    unsigned max_delay_us = 300)
      : bus_id_(std::move(bus_id)), seed_(seed), max_delay_us_(max_delay_us) {}
  ~FakeCuda() override { streams_.clear(); }  // runs what is queued

  // Where tensors lie, by default on the CPU; to be called before a world is made.
  void set_tensor_device(c10::Device device) { tensor_device_ = device; }

  cudaError_t get_device_count(int* count) override {
    *count = 8;
    return cudaSuccess;
  }
  cudaError_t runtime_get_version(int* version) override {
    *version = CUDART_VERSION;
    return cudaSuccess;
  }
  cudaError_t device_get_pci_bus_id(char* id, int length, int /*device*/) override {
    bus_id_.copy(id, static_cast<size_t>(length) - 1);
    return cudaSuccess;
  }
  cudaError_t set_device(int /*device*/) override { return cudaSuccess; }

  cudaError_t event_create(cudaEvent_t* event) override {
    count("event_create");
    auto made = std::make_shared<Mark>();
    const std::lock_guard<std::mutex> lock(mutex_);
    *event = reinterpret_cast<cudaEvent_t>(made.get());
    events_.emplace(*event, std::move(made));
    return cudaSuccess;
  }
  cudaError_t event_destroy(cudaEvent_t event) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return events_.erase(event) == 1 ? cudaSuccess : cudaErrorInvalidResourceHandle;
  }
  cudaError_t event_record(cudaEvent_t event, cudaStream_t stream) override {
    count("event_record");
    const std::shared_ptr<Mark> mark = find(event);
    if (mark == nullptr) return cudaErrorInvalidResourceHandle;
    const int64_t number = mark->add(stream);
    on_stream(stream, [mark, number] { mark->complete(number); });
    return cudaSuccess;
  }
  cudaError_t thread_exchange_stream_capture_mode(cudaStreamCaptureMode* mode) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::swap(capture_modes_[std::this_thread::get_id()], *mode);
    return cudaSuccess;
  }
  cudaError_t event_query(cudaEvent_t event) override {
    if (breaks_capture()) return cudaErrorStreamCaptureUnsupported;
    const std::shared_ptr<Mark> mark = find(event);
    if (mark == nullptr) return cudaErrorInvalidResourceHandle;
    if (device_error_) return cudaErrorLaunchFailure;
    return mark->is_done() ? cudaSuccess : cudaErrorNotReady;
  }
  cudaError_t stream_wait_event(cudaStream_t stream, cudaEvent_t event) override {
    count("stream_wait_event");
    const std::shared_ptr<Mark> mark = find(event);
    if (mark == nullptr) return cudaErrorInvalidResourceHandle;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      ++edges_[{number_of(mark->stream()), number_of(stream)}];
    }
    on_stream(stream, [mark, number = mark->last()] { mark->wait_for(number); });
    return cudaSuccess;
  }
  cudaError_t stream_query(cudaStream_t stream) override {
    count("stream_query");
    if (breaks_capture()) return cudaErrorStreamCaptureUnsupported;
    if (device_error_) return cudaErrorLaunchFailure;
    if (stream == current_stream(0)) return cudaSuccess;
    return reinterpret_cast<FakeStream*>(stream)->is_empty() ? cudaSuccess : cudaErrorNotReady;
  }
  std::string error_string(cudaError_t error) override {
    return error == cudaErrorLaunchFailure ? "unspecified launch failure"
                                           : "error " + std::to_string(error);
  }

  c10::Device tensor_device(int /*device*/) const override { return tensor_device_; }
  // As torch's default stream.
  cudaStream_t current_stream(int /*device*/) override { return nullptr; }
  cudaStream_t pool_stream(int /*device*/, bool high_priority) override {
    count(high_priority ? "pool_stream high" : "pool_stream");
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto number = static_cast<unsigned>(streams_.size());
    streams_.push_back(
        std::make_unique<FakeStream>(seed_ == 0 ? 0 : seed_ * 31 + number, max_delay_us_));
    return reinterpret_cast<cudaStream_t>(streams_.back().get());
  }
  void run(cudaStream_t stream, int /*device*/, const std::function<void()>& work) override {
    count("run");
    on_stream(stream, work);
  }

  at::Tensor allocate_pinned(int64_t nbytes) override {
    const at::Tensor memory = at::empty({nbytes}, at::kByte);
    const std::lock_guard<std::mutex> lock(mutex_);
    pinned_.insert(memory.const_data_ptr());
    return at::from_blob(
        memory.mutable_data_ptr(), {nbytes},
        [this, memory](void* freed) {
          const std::lock_guard<std::mutex> freeing(mutex_);
          pinned_.erase(freed);
        },
        at::kByte);
  }
  void copy_from_host(const at::Tensor& to, const at::Tensor& from, cudaStream_t stream,
                      int /*device*/) override {
    count("copy_from_host");
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!pinned_.contains(from.const_data_ptr())) ++counts_["synchronisation"];
    }
    on_stream(stream, [to, from] { to.copy_(from); });
  }

  // --- for tests and FakeNccl ---

  // A CUDA graph is captured, by a thread in the strictest mode.
  void set_capturing(bool is_capturing) { is_capturing_ = is_capturing; }
  // Queries while a graph was captured.
  [[nodiscard]] int num_captured_queries() const { return num_captured_queries_; }

  // Streams run what they are given at once, on the thread that gives it: so this must be the order
  // of all ranks. What the streams are asked for is as before.
  void run_at_once() { runs_at_once_ = true; }

  void on_stream(cudaStream_t stream, std::function<void()> task) {
    if (runs_at_once_ || stream == current_stream(0)) return task();
    reinterpret_cast<FakeStream*>(stream)->push(std::move(task));
  }
  // Every query fails from here on, as after a kernel that wrote out of bounds.
  void break_device() { device_error_ = true; }
  [[nodiscard]] int num_live_events() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int>(events_.size());
  }
  // Waits since the last time, by the streams of record and wait. Streams are numbered as they were
  // made; -1 is the current one.
  using Edge = std::pair<int, int>;
  [[nodiscard]] std::map<Edge, int> take_edges() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(edges_, {});
  }
  // Calls since the last time, by name; without queries of events, which the watchdog makes too.
  [[nodiscard]] std::map<std::string, int> take_counts() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(counts_, {});
  }

 private:
  // Records are numbered. An event may be recorded on another stream while an earlier record is
  // pending: what waits for that one still does.
  class Mark {
   public:
    int64_t add(cudaStream_t stream) {
      const std::lock_guard<std::mutex> lock(mutex_);
      stream_ = stream;
      pending_.insert(++last_);
      return last_;
    }
    // Of the last record.
    [[nodiscard]] cudaStream_t stream() const {
      const std::lock_guard<std::mutex> lock(mutex_);
      return stream_;
    }
    [[nodiscard]] int64_t last() const {
      const std::lock_guard<std::mutex> lock(mutex_);
      return last_;
    }
    void complete(int64_t number) {
      const std::lock_guard<std::mutex> lock(mutex_);
      pending_.erase(number);
      changed_.notify_all();
    }
    [[nodiscard]] bool is_done() const {
      const std::lock_guard<std::mutex> lock(mutex_);
      return !pending_.contains(last_);
    }
    void wait_for(int64_t number) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [&] { return !pending_.contains(number); });
    }

   private:
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    cudaStream_t stream_ = nullptr;
    int64_t last_ = 0;
    std::set<int64_t> pending_;
  };

  [[nodiscard]] std::shared_ptr<Mark> find(cudaEvent_t event) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = events_.find(event);
    return found == events_.end() ? nullptr : found->second;
  }
  // A query of this thread may not run now.
  [[nodiscard]] bool breaks_capture() {
    if (!is_capturing_) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    ++num_captured_queries_;
    return capture_modes_[std::this_thread::get_id()] != cudaStreamCaptureModeRelaxed;
  }
  // Call with mutex_ held.
  [[nodiscard]] int number_of(cudaStream_t stream) const {
    for (size_t i = 0; i < streams_.size(); ++i) {
      if (reinterpret_cast<cudaStream_t>(streams_[i].get()) == stream) return static_cast<int>(i);
    }
    return -1;
  }
  void count(const char* name) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++counts_[name];
  }

  const std::string bus_id_;
  const unsigned seed_;
  c10::Device tensor_device_ = c10::kCPU;
  const unsigned max_delay_us_;
  bool runs_at_once_ = false;
  std::atomic<bool> device_error_ = false;
  std::atomic<bool> is_capturing_ = false;
  std::atomic<int> num_captured_queries_ = 0;
  mutable std::mutex mutex_;
  // Guarded by mutex_.
  std::map<std::thread::id, cudaStreamCaptureMode> capture_modes_;
  std::map<cudaEvent_t, std::shared_ptr<Mark>> events_;
  std::map<std::string, int> counts_;
  std::map<Edge, int> edges_;
  std::set<const void*> pinned_;
  std::vector<std::unique_ptr<FakeStream>> streams_;
};

}  // namespace mics::testing
