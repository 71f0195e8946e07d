#include "mics/phase_orders.h"

#include <gtest/gtest.h>

#include <initializer_list>
#include <vector>

namespace mics {
namespace {

constexpr auto kForward = PhaseOrders::Kind::kForward;
constexpr auto kBackward = PhaseOrders::Kind::kBackward;

std::vector<int> list(std::span<const int> units) { return {units.begin(), units.end()}; }

// True when every use, and their end, was expected.
bool run(PhaseOrders& orders, PhaseOrders::Kind kind, std::initializer_list<int> units,
         bool looks_past = true) {
  bool is_expected = true;
  orders.begin(kind, looks_past);
  for (const int unit : units) is_expected = orders.use(unit) && is_expected;
  is_expected = orders.end_uses() && is_expected;
  orders.end();
  return is_expected;
}

TEST(PhaseOrders, ReplaysWhatWasRecordedIntoThePhaseThatFollowed) {
  PhaseOrders orders(3);
  EXPECT_TRUE(run(orders, kForward, {0, 1, 2}));
  EXPECT_TRUE(run(orders, kBackward, {2, 1, 0}));
  orders.begin(kForward, true);
  EXPECT_TRUE(orders.upcoming(3).empty());  // not known before its first use
  EXPECT_TRUE(orders.use(0));
  EXPECT_EQ(list(orders.upcoming(1)), (std::vector<int>{1}));
  EXPECT_EQ(list(orders.upcoming(5)), (std::vector<int>{1, 2}));
  EXPECT_EQ(list(orders.following(2)), (std::vector<int>{2, 1}));
}

TEST(PhaseOrders, KnowsNothingBeyondAPhaseThatDoesNotLookPastItsEnd) {
  PhaseOrders orders(2);
  run(orders, kForward, {0, 1});
  run(orders, kBackward, {1, 0}, /*looks_past=*/false);
  run(orders, kForward, {0, 1});
  orders.begin(kBackward, false);
  EXPECT_TRUE(orders.use(1));
  EXPECT_TRUE(orders.following(2).empty());
}

TEST(PhaseOrders, AnotherOrderIsSeenCountedAndRecordedAnew) {
  PhaseOrders orders(3);
  run(orders, kForward, {0, 1, 2});
  EXPECT_FALSE(run(orders, kForward, {0, 2, 1}));
  EXPECT_EQ(orders.num_changes(), 1);
  EXPECT_TRUE(run(orders, kForward, {0, 2, 1}));
  EXPECT_FALSE(run(orders, kForward, {0, 2}));  // fewer
  EXPECT_EQ(orders.num_changes(), 2);
}

// What was started for the phase that did not come must be dropped, but no order has changed.
TEST(PhaseOrders, AnotherPhaseThanFollowedTheLastTimeIsSeen) {
  PhaseOrders orders(3);
  run(orders, kForward, {0, 1});
  run(orders, kBackward, {1, 0});
  run(orders, kForward, {0, 1});
  EXPECT_FALSE(run(orders, kForward, {0, 1}));
  EXPECT_EQ(orders.num_changes(), 0);
}

TEST(PhaseOrders, UsesOutsideOfAPhaseAreNotRecorded) {
  PhaseOrders orders(2);
  EXPECT_TRUE(orders.use(1));
  EXPECT_TRUE(orders.upcoming(1).empty());
  EXPECT_TRUE(run(orders, kForward, {0, 1}));
}

TEST(PhaseOrders, ForgetsWhatWasRecorded) {
  PhaseOrders orders(2);
  run(orders, kForward, {0, 1});
  orders.begin(kForward, true);
  orders.forget();
  EXPECT_FALSE(orders.is_open(kForward));
  EXPECT_TRUE(run(orders, kForward, {0}));
  EXPECT_EQ(orders.num_changes(), 0);
}

}  // namespace
}  // namespace mics
