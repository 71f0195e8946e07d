#include "plan/execution_order.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <vector>

namespace mics {
namespace {

constexpr auto kForward = Phase::kForward;
constexpr auto kBackward = Phase::kBackward;

std::vector<int> list(std::span<const int> units) { return {units.begin(), units.end()}; }

std::vector<int> upcoming(const PhaseRecord& record, int depth) {
  return list(record.upcoming(depth));
}

void run(PhaseRecord& record, const std::vector<int>& units) {
  record.begin();
  for (const int unit : units) record.use(unit);
  record.end();
}

TEST(PhaseRecord, KnowsNothingWhileItRecords) {
  PhaseRecord record;
  record.begin();
  EXPECT_TRUE(record.use(3));
  EXPECT_TRUE(upcoming(record, 4).empty());
  EXPECT_TRUE(record.use(1));
  EXPECT_TRUE(record.end());
}

TEST(PhaseRecord, ReplaysWhatItRecorded) {
  PhaseRecord record;
  run(record, {0, 1, 1, 2});
  record.begin();
  EXPECT_EQ(upcoming(record, 2), (std::vector<int>{0, 1}));
  EXPECT_TRUE(record.use(0));
  EXPECT_EQ(upcoming(record, 2), (std::vector<int>{1, 1}));
  EXPECT_EQ(upcoming(record, 9), (std::vector<int>{1, 1, 2}));
  EXPECT_TRUE(upcoming(record, 0).empty());
}

TEST(PhaseRecord, AnotherUnitCutsTheRecordAndIsRecorded) {
  PhaseRecord record;
  run(record, {0, 1, 2, 3});
  record.begin();
  EXPECT_TRUE(record.use(0));
  EXPECT_FALSE(record.use(2));
  EXPECT_TRUE(upcoming(record, 4).empty());
  EXPECT_TRUE(record.use(1));
  EXPECT_TRUE(record.end());
  record.begin();
  EXPECT_EQ(upcoming(record, 9), (std::vector<int>{0, 2, 1}));
}

TEST(PhaseRecord, AShorterPhaseCutsTheRecord) {
  PhaseRecord record;
  run(record, {0, 1, 2});
  record.begin();
  record.use(0);
  EXPECT_FALSE(record.end());
  record.begin();
  EXPECT_EQ(upcoming(record, 9), (std::vector<int>{0}));
}

TEST(PhaseRecord, ALongerPhaseIsRecordedOn) {
  PhaseRecord record;
  run(record, {0});
  record.begin();
  EXPECT_TRUE(record.use(0));
  EXPECT_TRUE(record.use(1));
  EXPECT_TRUE(record.end());
  record.begin();
  EXPECT_EQ(upcoming(record, 9), (std::vector<int>{0, 1}));
}

// True when every use, and their end, was expected.
bool run(ExecutionOrder& order, Phase kind, std::initializer_list<int> units,
         bool looks_past = true) {
  bool is_expected = true;
  order.begin(kind, looks_past);
  for (const int unit : units) is_expected = order.use(unit) && is_expected;
  is_expected = order.end_uses() && is_expected;
  order.end();
  return is_expected;
}

TEST(ExecutionOrder, ReplaysWhatWasRecordedIntoThePhaseThatFollowed) {
  ExecutionOrder order(3);
  EXPECT_TRUE(run(order, kForward, {0, 1, 2}));
  EXPECT_TRUE(run(order, kBackward, {2, 1, 0}));
  order.begin(kForward, true);
  EXPECT_TRUE(order.upcoming(3).empty());  // not known before its first use
  EXPECT_TRUE(order.use(0));
  EXPECT_EQ(list(order.upcoming(1)), (std::vector<int>{1}));
  EXPECT_EQ(list(order.upcoming(5)), (std::vector<int>{1, 2}));
  EXPECT_EQ(list(order.following(2)), (std::vector<int>{2, 1}));
}

TEST(ExecutionOrder, KnowsNothingBeyondAPhaseThatDoesNotLookPastItsEnd) {
  ExecutionOrder order(2);
  run(order, kForward, {0, 1});
  run(order, kBackward, {1, 0}, /*looks_past=*/false);
  run(order, kForward, {0, 1});
  order.begin(kBackward, false);
  EXPECT_TRUE(order.use(1));
  EXPECT_TRUE(order.following(2).empty());
}

TEST(ExecutionOrder, AnotherOrderIsSeenCountedAndRecordedAnew) {
  ExecutionOrder order(3);
  run(order, kForward, {0, 1, 2});
  EXPECT_FALSE(run(order, kForward, {0, 2, 1}));
  EXPECT_EQ(order.num_changes(), 1);
  EXPECT_TRUE(run(order, kForward, {0, 2, 1}));
  EXPECT_FALSE(run(order, kForward, {0, 2}));  // fewer
  EXPECT_EQ(order.num_changes(), 2);
}

// What was started for the phase that did not come must be dropped, but no order has changed.
TEST(ExecutionOrder, AnotherPhaseThanFollowedTheLastTimeIsSeen) {
  ExecutionOrder order(3);
  run(order, kForward, {0, 1});
  run(order, kBackward, {1, 0});
  run(order, kForward, {0, 1});
  EXPECT_FALSE(run(order, kForward, {0, 1}));
  EXPECT_EQ(order.num_changes(), 0);
}

TEST(ExecutionOrder, UsesOutsideOfAPhaseAreNotRecorded) {
  ExecutionOrder order(2);
  EXPECT_TRUE(order.use(1));
  EXPECT_TRUE(order.upcoming(1).empty());
  EXPECT_TRUE(run(order, kForward, {0, 1}));
}

TEST(ExecutionOrder, ForgetsWhatWasRecorded) {
  ExecutionOrder order(2);
  run(order, kForward, {0, 1});
  order.begin(kForward, true);
  order.forget();
  EXPECT_FALSE(order.is_open(kForward));
  EXPECT_TRUE(run(order, kForward, {0}));
  EXPECT_EQ(order.num_changes(), 0);
}

}  // namespace
}  // namespace mics
