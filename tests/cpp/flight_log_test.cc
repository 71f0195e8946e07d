#include "mics/flight_log.h"

#include <gtest/gtest.h>

#include <chrono>
#include <memory>
#include <stdexcept>
#include <torch/csrc/distributed/c10d/HashStore.hpp>
#include <vector>

#include "comm/c10d/store_reports.h"
#include "mics/error.h"

namespace mics {
namespace {

TEST(FlightLog, KeepsTheLastOperationsOldestFirst) {
  FlightLog log(3);
  for (int i = 0; i < 5; ++i) {
    const int64_t id = log.issue("a [0 1]", "all_gather", "layer", 8 * i);
    log.start(id);
    if (i < 4) log.finish(id);
  }
  const std::vector<LoggedOperation> logged = log.operations();
  ASSERT_EQ(logged.size(), 3u);
  EXPECT_EQ(logged.front().number, 3);
  EXPECT_EQ(logged.back().number, 5);
  EXPECT_EQ(logged.back().nbytes, 32);
  EXPECT_EQ(logged.front().state, LoggedOperation::State::kFinished);
  EXPECT_EQ(logged.back().state, LoggedOperation::State::kStarted);
  EXPECT_LE(logged.front().started_at, logged.front().ended_at);
}

TEST(FlightLog, FollowsEachGroup) {
  FlightLog log;
  const int64_t first = log.issue("a", "all_gather", "one", 4);
  const int64_t second = log.issue("b", "all_reduce", "", 16);
  const int64_t third = log.issue("a", "reduce_scatter", "two", 8);
  log.finish(first);
  log.fail(third);
  const std::vector<GroupProgress> expected = {
      {"a", 2, 1, "reduce_scatter of unit \"two\", 8 bytes"}, {"b", 1, 0, "all_reduce, 16 bytes"}};
  EXPECT_EQ(log.progress(), expected);
  EXPECT_EQ(decode_progress(encode_progress(expected)), expected);
  log.finish(second);
  EXPECT_EQ(log.progress()[1].current, "");
}

// The ring has forgotten the operation; the counts have not.
TEST(FlightLog, CountsBeyondItsCapacity) {
  FlightLog log(2);
  const int64_t old = log.issue("a", "all_gather", "", 4);
  for (int i = 0; i < 4; ++i) log.finish(log.issue("b", "all_gather", "", 4));
  log.finish(old);
  EXPECT_EQ(log.progress()[1].num_finished, 4);
  EXPECT_EQ(log.progress()[0].num_issued, 1);
  EXPECT_THROW(FlightLog(0), InvalidArgument);
}

TEST(FlightLog, ReportsOnceAnIncident) {
  FlightLog log;
  int calls = 0;
  log.set_reporter([&](const FlightLog&) { return "report " + std::to_string(++calls); });
  EXPECT_EQ(log.report_failure(), "report 1");
  EXPECT_EQ(log.report_failure(), "report 1");
  log.begin_incident();
  EXPECT_EQ(log.report_failure(), "report 2");
  EXPECT_EQ(log.report_failure(), "report 2");
}

// Rank 1 answers from its thread; the second report shows where it was then.
TEST(StoreReports, EachIncidentHasATableOfItsOwn) {
  using std::chrono::milliseconds;
  const auto store = c10::make_intrusive<c10d::HashStore>();
  std::vector<std::shared_ptr<FlightLog>> logs;
  for (int rank = 0; rank < 2; ++rank) {
    logs.push_back(make_reporting_log(store, rank, 2, milliseconds(5), milliseconds(20000)));
  }
  const auto run = [&](FlightLog& log) { log.finish(log.issue("a [0 1]", "all_gather", "", 4)); };
  (void)logs[0]->issue("a [0 1]", "all_gather", "one", 4);
  const std::string first = logs[0]->report_failure();
  EXPECT_NE(first.find("world_rank 1: in no collective"), std::string::npos) << first;
  run(*logs[1]);
  run(*logs[1]);
  EXPECT_EQ(logs[0]->report_failure(), first);
  for (const auto& log : logs) log->begin_incident();
  const std::string second = logs[0]->report_failure();
  EXPECT_NE(second.find("world_rank 1: a [0 1]: 2 finished, none issued"), std::string::npos)
      << second;
}

TEST(FlightLog, NamesWhoIsBehindAndWhoIsGone) {
  const std::string text =
      describe_ranks({{{{"a [0 1]", 7, 6, "all_gather of unit \"layers.3\", 64 bytes"},
                        {"quiet [0 1]", 2, 2, ""}}},
                      {{{"a [0 1]", 6, 6, ""}, {"quiet [0 1]", 2, 2, ""}}},
                      std::nullopt,
                      {std::vector<GroupProgress>{}}});
  EXPECT_EQ(text,
            "What each rank was doing (operations of a group count from 1):\n"
            "  world_rank 0: a [0 1]: in operation 7, all_gather of unit \"layers.3\", 64 bytes\n"
            "  world_rank 1: a [0 1]: 6 finished, none issued, behind (others have issued 7)\n"
            "  world_rank 2: no answer; it has ended or is stopped\n"
            "  world_rank 3: in no collective");
}

}  // namespace
}  // namespace mics
