#include "mics/model/measured_table.h"

#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

MeasuredTable two_rows() {
  return MeasuredTable({{32, 400, 9}, {16, 100, 2}, {16, 400, 8}, {32, 100, 3}});
}

TEST(MeasuredTable, GivesWhatWasMeasured) {
  const MeasuredTable table = two_rows();
  for (const MeasuredPoint& point : table.points()) {
    const MeasuredTable::Reading reading = table.read(point.num_ranks, point.nbytes);
    EXPECT_DOUBLE_EQ(reading.seconds, point.seconds);
    EXPECT_TRUE(reading.is_inside(point.num_ranks, point.nbytes));
  }
}

TEST(MeasuredTable, InterpolatesBytesOnLogarithmicAxesAndRanksLinearly) {
  const MeasuredTable table = two_rows();
  // 200 is half way between 100 and 400 on a logarithmic axis, and 4 between 2 and 8.
  EXPECT_DOUBLE_EQ(table.read(16, 200).seconds, 4);
  EXPECT_DOUBLE_EQ(table.read(24, 100).seconds, 2.5);
  EXPECT_TRUE(table.read(24, 200).is_inside(24, 200));
}

TEST(MeasuredTable, SaysThatItWasLeft) {
  const MeasuredTable table = two_rows();
  const MeasuredTable::Reading reading = table.read(64, 1000);
  EXPECT_FALSE(reading.is_inside(64, 1000));
  EXPECT_EQ(reading.num_ranks, 32);
  EXPECT_EQ(reading.nbytes, 400);
  EXPECT_DOUBLE_EQ(reading.seconds, 9);
  EXPECT_FALSE(table.read(8, 100).is_inside(8, 100));
  EXPECT_FALSE(table.read(16, 50).is_inside(16, 50));
}

TEST(MeasuredTable, TakesOnlyBytesThatBothRowsHave) {
  const MeasuredTable table({{16, 100, 2}, {16, 400, 8}, {32, 200, 5}, {32, 400, 9}});
  EXPECT_FALSE(table.read(24, 100).is_inside(24, 100));
  EXPECT_TRUE(table.read(16, 100).is_inside(16, 100));
  EXPECT_TRUE(table.read(24, 300).is_inside(24, 300));
}

TEST(MeasuredTable, RefusesPointsThatAreNone) {
  EXPECT_THROW(MeasuredTable({{0, 1, 1}}), InvalidArgument);
  EXPECT_THROW(MeasuredTable({{1, 0, 1}}), InvalidArgument);
  EXPECT_THROW(MeasuredTable({{1, 1, 0}}), InvalidArgument);
  EXPECT_THROW(MeasuredTable({{1, 1, 1}, {1, 1, 2}}), InvalidArgument);
  EXPECT_THROW((void)MeasuredTable().read(1, 1), InvalidArgument);
}

}  // namespace
}  // namespace mics
