// ScheduleRecorder: streams and communicators that write down what they are asked for, and a proof
// that what was asked is ordered.
//
// A stream logs accesses to memory (Stream::note_read, note_write), and records and waits of
// events. Only events order streams here, not the order in which the host issued the work. check()
// gives every entry a vector clock and compares each access with earlier ones to the same bytes.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "mics/communicator.h"
#include "mics/flight_log.h"
#include "mics/runtime_streams.h"

namespace mics::testing {

inline constexpr int kNumStreams = 6;
inline constexpr const char* kStreamNames[kNumStreams] = {
    "compute", "gather_rail", "gather_intra", "reduce_intra", "reduce_rail", "replicate"};

struct ScheduleEntry {
  enum class Kind { kRead, kWrite, kRecord, kWait };
  Kind kind;
  int stream;
  // Of an access, in bytes.
  const char* first = nullptr;
  const char* last = nullptr;
  int event = -1;         // of a record or a wait
  int event_stream = -1;  // of a wait: where the event was recorded; -1: never
};

class ScheduleRecorder {
 public:
  [[nodiscard]] std::shared_ptr<RuntimeStreams> make_streams();
  // Moves no shard and no gradient; operations go into log().
  [[nodiscard]] std::unique_ptr<Communicator> make_communicator(GroupInfo group);
  [[nodiscard]] const std::vector<ScheduleEntry>& entries() const { return entries_; }
  [[nodiscard]] std::vector<ScheduleEntry>& entries() { return entries_; }
  [[nodiscard]] const FlightLog& log() const { return *log_; }

 private:
  friend class RecordingStream;
  std::vector<ScheduleEntry> entries_;
  std::vector<at::Tensor> kept_;  // no address is used twice
  std::vector<int> stream_of_event_;
  std::shared_ptr<FlightLog> log_ = std::make_shared<FlightLog>(1 << 16);
};

class RecordingEvent final : public Event {
 public:
  explicit RecordingEvent(int id) : id(id) {}
  bool query() const override { return true; }
  void synchronize() override {}
  const int id;
};

class RecordingStream final : public Stream {
 public:
  RecordingStream(ScheduleRecorder& recorder, int index) : recorder_(recorder), index_(index) {}
  void enqueue(std::function<void()> work) override { work(); }
  std::unique_ptr<Event> make_event() override {
    recorder_.stream_of_event_.push_back(-1);
    return std::make_unique<RecordingEvent>(static_cast<int>(recorder_.stream_of_event_.size()) -
                                            1);
  }
  void record(Event& event) override {
    const int id = static_cast<RecordingEvent&>(event).id;
    recorder_.stream_of_event_[static_cast<size_t>(id)] = index_;
    add({ScheduleEntry::Kind::kRecord, index_, nullptr, nullptr, id, index_});
  }
  void wait(const Event& event) override {
    const int id = static_cast<const RecordingEvent&>(event).id;
    add({ScheduleEntry::Kind::kWait, index_, nullptr, nullptr, id,
         recorder_.stream_of_event_[static_cast<size_t>(id)]});
  }
  void synchronize() override {}
  void reset() override {}
  bool has_failed() const override { return false; }
  void note_read(const at::Tensor& tensor) override { note(ScheduleEntry::Kind::kRead, tensor); }
  void note_write(const at::Tensor& tensor) override { note(ScheduleEntry::Kind::kWrite, tensor); }

 private:
  void add(const ScheduleEntry& entry) { recorder_.entries_.push_back(entry); }
  void note(ScheduleEntry::Kind kind, const at::Tensor& tensor) {
    if (tensor.numel() == 0) return;
    recorder_.kept_.push_back(tensor);
    const auto* first = static_cast<const char*>(tensor.const_data_ptr());
    add({kind, index_, first, first + tensor.nbytes()});
  }

  ScheduleRecorder& recorder_;
  const int index_;
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
  auto streams = std::make_shared<RuntimeStreams>();
  std::unique_ptr<Stream>* const members[kNumStreams] = {
      &streams->compute,      &streams->gather_rail, &streams->gather_intra,
      &streams->reduce_intra, &streams->reduce_rail, &streams->replicate};
  for (int i = 0; i < kNumStreams; ++i) *members[i] = std::make_unique<RecordingStream>(*this, i);
  return streams;
}

inline std::unique_ptr<Communicator> ScheduleRecorder::make_communicator(GroupInfo group) {
  auto made = std::make_unique<RecordingCommunicator>(std::move(group));
  made->set_flight_log(log_);
  return made;
}

// Empty: every two conflicting accesses are ordered. `skipped`: an entry to leave out, a wait.
inline std::string check_order(const std::vector<ScheduleEntry>& entries, int skipped = -1) {
  using Clock = std::vector<int>;
  struct Past {
    ScheduleEntry access;
    int time;  // of its own stream
  };
  std::vector<Clock> clocks(kNumStreams, Clock(kNumStreams, 0));
  std::map<int, Clock> marks;
  std::vector<Past> past;
  for (size_t i = 0; i < entries.size(); ++i) {
    const ScheduleEntry& entry = entries[i];
    Clock& clock = clocks[static_cast<size_t>(entry.stream)];
    const auto own = static_cast<size_t>(entry.stream);
    if (entry.kind == ScheduleEntry::Kind::kRecord) {
      marks[entry.event] = clock;
    } else if (entry.kind == ScheduleEntry::Kind::kWait) {
      const auto mark = marks.find(entry.event);
      if (mark == marks.end() || static_cast<int>(i) == skipped) continue;
      for (size_t s = 0; s < kNumStreams; ++s) clock[s] = std::max(clock[s], mark->second[s]);
    } else {
      ++clock[own];
      const bool is_write = entry.kind == ScheduleEntry::Kind::kWrite;
      for (const Past& before : past) {
        const ScheduleEntry& other = before.access;
        const bool conflicts = other.first < entry.last && entry.first < other.last &&
                               (is_write || other.kind == ScheduleEntry::Kind::kWrite);
        if (!conflicts || clock[static_cast<size_t>(other.stream)] >= before.time) continue;
        std::ostringstream text;
        text << "entry " << i << ": " << kStreamNames[entry.stream]
             << (is_write ? " writes" : " reads") << " what " << kStreamNames[other.stream]
             << (other.kind == ScheduleEntry::Kind::kWrite ? " writes" : " reads")
             << ", and no event orders them";
        return text.str();
      }
      // Whoever is ordered after this write is ordered after what it covers.
      if (is_write) {
        std::erase_if(past, [&](const Past& before) {
          return entry.first <= before.access.first && before.access.last <= entry.last;
        });
      }
      past.push_back({entry, clock[own]});
    }
  }
  return {};
}

}  // namespace mics::testing
