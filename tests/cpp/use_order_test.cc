#include "mics/use_order.h"

#include <gtest/gtest.h>

namespace mics {
namespace {

std::vector<int> upcoming(const UseOrder& order, int depth) {
  const std::span<const int> units = order.upcoming(depth);
  return {units.begin(), units.end()};
}

void run(UseOrder& order, const std::vector<int>& units) {
  order.begin();
  for (const int unit : units) order.note(unit);
  order.end();
}

TEST(UseOrder, KnowsNothingWhileItRecords) {
  UseOrder order;
  order.begin();
  EXPECT_TRUE(order.note(3));
  EXPECT_TRUE(upcoming(order, 4).empty());
  EXPECT_TRUE(order.note(1));
  EXPECT_TRUE(order.end());
}

TEST(UseOrder, ReplaysWhatItRecorded) {
  UseOrder order;
  run(order, {0, 1, 1, 2});
  order.begin();
  EXPECT_EQ(upcoming(order, 2), (std::vector<int>{0, 1}));
  EXPECT_TRUE(order.note(0));
  EXPECT_EQ(upcoming(order, 2), (std::vector<int>{1, 1}));
  EXPECT_EQ(upcoming(order, 9), (std::vector<int>{1, 1, 2}));
  EXPECT_TRUE(upcoming(order, 0).empty());
}

TEST(UseOrder, AnotherUnitCutsTheRecordAndIsRecorded) {
  UseOrder order;
  run(order, {0, 1, 2, 3});
  order.begin();
  EXPECT_TRUE(order.note(0));
  EXPECT_FALSE(order.note(2));
  EXPECT_TRUE(upcoming(order, 4).empty());
  EXPECT_TRUE(order.note(1));
  EXPECT_TRUE(order.end());
  order.begin();
  EXPECT_EQ(upcoming(order, 9), (std::vector<int>{0, 2, 1}));
}

TEST(UseOrder, AShorterPhaseCutsTheRecord) {
  UseOrder order;
  run(order, {0, 1, 2});
  order.begin();
  order.note(0);
  EXPECT_FALSE(order.end());
  order.begin();
  EXPECT_EQ(upcoming(order, 9), (std::vector<int>{0}));
}

TEST(UseOrder, ALongerPhaseIsRecordedOn) {
  UseOrder order;
  run(order, {0});
  order.begin();
  EXPECT_TRUE(order.note(0));
  EXPECT_TRUE(order.note(1));
  EXPECT_TRUE(order.end());
  order.begin();
  EXPECT_EQ(upcoming(order, 9), (std::vector<int>{0, 1}));
}

}  // namespace
}  // namespace mics
