#include "comm/c10d/store_reports.h"

#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>
#include <vector>

#include "comm/store_clone.h"

namespace mics {

namespace {

std::string alarm_of(int64_t incident) { return "alarm/" + std::to_string(incident); }
std::string key_of(int64_t incident, int rank) {
  return "progress/" + std::to_string(incident) + "/" + std::to_string(rank);
}

// A flight log, and the thread that answers the reports of other ranks from it.
class ReportingLog {
 public:
  ReportingLog(c10::intrusive_ptr<c10d::Store> for_thread, c10::intrusive_ptr<c10d::Store> for_log,
               int rank, int world_size, std::chrono::milliseconds interval,
               std::chrono::milliseconds patience)
      : for_thread_(std::move(for_thread)),
        for_log_(std::move(for_log)),
        rank_(rank),
        world_size_(world_size),
        interval_(interval),
        patience_(patience) {
    log_.set_reporter([this](const FlightLog& log) { return report(log); });
    thread_ = std::thread([this] { answer(); });
  }

  ~ReportingLog() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      is_closing_ = true;
    }
    closing_.notify_all();
    thread_.join();
  }

  FlightLog& log() { return log_; }

 private:
  void publish(c10d::Store& store, int64_t incident, const FlightLog& log) {
    store.set(key_of(incident, rank_), encode_progress(log.progress()));
  }

  // Runs on the thread: polls for alarms, and answers each once.
  void answer() {
    int64_t answered = -1;
    std::unique_lock<std::mutex> lock(mutex_);
    while (!closing_.wait_for(lock, interval_, [this] { return is_closing_; })) {
      lock.unlock();
      try {
        const int64_t incident = log_.incident();
        if (incident != answered && for_thread_->check({alarm_of(incident)})) {
          publish(*for_thread_, incident, log_);
          answered = incident;
        }
      } catch (const std::exception&) {
        return;  // the Store has ended: nobody will read an answer
      }
      lock.lock();
    }
  }

  // Runs on the thread of the operation that failed.
  std::string report(const FlightLog& log) {
    const int64_t incident = log.incident();
    std::vector<std::optional<std::vector<GroupProgress>>> ranks(static_cast<size_t>(world_size_));
    ranks[static_cast<size_t>(rank_)] = log.progress();
    try {
      publish(*for_log_, incident, log);
      for_log_->set(alarm_of(incident), std::string("1"));
      const auto end = std::chrono::steady_clock::now() + patience_;
      while (!take_answers(incident, ranks) && std::chrono::steady_clock::now() < end) {
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
      }
    } catch (const std::exception& error) {
      return describe_ranks(ranks) + "\n  (the Store does not answer: " + error.what() + ")";
    }
    return describe_ranks(ranks);
  }

  // Reads the answers that are there; true when all ranks have answered.
  bool take_answers(int64_t incident,
                    std::vector<std::optional<std::vector<GroupProgress>>>& ranks) {
    bool are_all = true;
    for (int rank = 0; rank < world_size_; ++rank) {
      auto& answer = ranks[static_cast<size_t>(rank)];
      if (answer) continue;
      if (!for_log_->check({key_of(incident, rank)})) {
        are_all = false;
        continue;
      }
      answer = decode_progress(for_log_->get_to_str(key_of(incident, rank)));
    }
    return are_all;
  }

  const c10::intrusive_ptr<c10d::Store> for_thread_;
  const c10::intrusive_ptr<c10d::Store> for_log_;
  const int rank_;
  const int world_size_;
  const std::chrono::milliseconds interval_;
  const std::chrono::milliseconds patience_;
  FlightLog log_;
  std::mutex mutex_;
  std::condition_variable closing_;
  bool is_closing_ = false;  // guarded by mutex_
  std::thread thread_;       // last: it uses the members above
};

}  // namespace

std::shared_ptr<FlightLog> make_reporting_log(const c10::intrusive_ptr<c10d::Store>& store,
                                              int rank, int world_size,
                                              std::chrono::milliseconds interval,
                                              std::chrono::milliseconds patience) {
  auto owner =
      std::make_shared<ReportingLog>(clone_store(store, patience), clone_store(store, patience),
                                     rank, world_size, interval, patience);
  return {owner, &owner->log()};
}

}  // namespace mics
