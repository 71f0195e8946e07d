#include "mics/shard_layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "mics/error.h"

namespace mics {
namespace {

int64_t numel_of(const std::vector<int64_t>& sizes) {
  int64_t numel = 1;
  for (const int64_t size : sizes) numel *= size;
  return numel;
}

void check_layout(const std::vector<ParameterShape>& shapes, int p, int64_t alignment) {
  const ShardLayout layout(shapes, p, alignment);
  int64_t shard_end = 0;
  int64_t full_end = 0;
  int64_t payload = 0;
  int64_t numel = 0;
  for (int i = 0; i < layout.num_parameters(); ++i) {
    const ParameterLayout& parameter = layout.parameter(i);
    // Aligned, in order, disjoint.
    ASSERT_EQ(parameter.shard_offset % alignment, 0);
    ASSERT_EQ(parameter.region_offset % alignment, 0);
    ASSERT_GE(parameter.shard_offset, shard_end);
    ASSERT_GE(parameter.region_offset, full_end);
    shard_end = parameter.shard_offset + parameter.chunk_numel;
    full_end = parameter.region_offset + parameter.region_numel;
    ASSERT_LE(shard_end, layout.shard_numel());
    ASSERT_LE(full_end, layout.full_numel());
    // The full parameter is the front of its region.
    ASSERT_EQ(parameter.numel(), numel_of(shapes[static_cast<size_t>(i)].sizes));
    ASSERT_LE(parameter.numel(), parameter.region_numel);
    ASSERT_EQ(parameter.region_numel, p * parameter.chunk_numel);
    payload += parameter.chunk_numel;
    numel += parameter.numel();
    // Rows: every one has one owner, in rank order, as torch.chunk cuts them.
    int64_t next = 0;
    for (int rank = 0; rank < p; ++rank) {
      const ShardLayout::RowRange rows = layout.rows_of(i, rank);
      ASSERT_LE(rows.first, rows.last);
      ASSERT_LE(rows.last - rows.first, parameter.chunk_rows);
      if (rows.first < rows.last) {
        ASSERT_EQ(rows.first, next);
        ASSERT_EQ(rows.first, parameter.chunk_rows * rank);
        next = rows.last;
      }
    }
    ASSERT_EQ(next, parameter.num_rows);
    // No more padding than one chunk per rank needs.
    ASSERT_LT(parameter.chunk_rows * p - parameter.num_rows, std::max<int64_t>(p, 1));
  }
  ASSERT_EQ(layout.payload_numel(), payload);
  ASSERT_EQ(layout.parameter_numel(), numel);
  ASSERT_LE(layout.shard_numel() - payload, layout.num_parameters() * (alignment - 1));
}

TEST(ShardLayout, HoldsItsInvariantsForRandomUnits) {
  std::mt19937 random(20260101);
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<ParameterShape> shapes;
    const int64_t num_parameters = draw(0, 8);
    for (int64_t i = 0; i < num_parameters; ++i) {
      std::vector<int64_t> sizes;
      const int64_t num_dims = draw(0, 4);
      // Rows from none to many more than ranks; now and then an empty row.
      for (int64_t dim = 0; dim < num_dims; ++dim) sizes.push_back(draw(dim == 0 ? 0 : 1, 19));
      if (num_dims > 1 && draw(0, 20) == 0) sizes.back() = 0;
      shapes.push_back({sizes});
    }
    check_layout(shapes, static_cast<int>(draw(1, 17)), int64_t{1} << draw(0, 3));
    if (HasFatalFailure()) FAIL() << "trial " << trial;
  }
}

TEST(ShardLayout, MatchesThePictureInTheHeader) {
  const ShardLayout layout({{{4, 3}}, {{2, 5}}}, 4, 4);
  EXPECT_EQ(layout.parameter(0).chunk_numel, 3);
  EXPECT_EQ(layout.parameter(1).shard_offset, 4);
  EXPECT_EQ(layout.shard_numel(), 4 + 8);
  EXPECT_EQ(layout.payload_numel(), 3 + 5);
  EXPECT_EQ(layout.parameter(1).region_offset, 12);
  EXPECT_EQ(layout.full_numel(), 12 + 20);
  EXPECT_EQ(layout.rows_of(1, 3).first, layout.rows_of(1, 3).last);
}

TEST(ShardLayout, ZeroDimParameterIsOneRow) {
  const ShardLayout layout({{{}}}, 3, 1);
  EXPECT_EQ(layout.parameter(0).numel(), 1);
  EXPECT_EQ(layout.rows_of(0, 0).last, 1);
  EXPECT_EQ(layout.rows_of(0, 1).first, layout.rows_of(0, 1).last);
}

TEST(ShardLayout, ZeroRowsTakeNoSpace) {
  const ShardLayout layout({{{0, 7}}, {{3}}}, 2, 4);
  EXPECT_EQ(layout.parameter(0).chunk_numel, 0);
  EXPECT_EQ(layout.shard_numel(), 4);
}

TEST(ShardLayout, OnePartyHoldsEverything) {
  const ShardLayout layout({{{5, 2}}, {{3}}}, 1, 1);
  EXPECT_EQ(layout.shard_numel(), layout.full_numel());
  EXPECT_EQ(layout.shard_numel(), 13);
}

TEST(ShardLayout, RefusesBadArguments) {
  EXPECT_THROW(ShardLayout({}, 0, 1), InvalidArgument);
  EXPECT_THROW(ShardLayout({}, 1, 0), InvalidArgument);
  EXPECT_THROW(ShardLayout({{{-1}}}, 1, 1), InvalidArgument);
  EXPECT_THROW((void)ShardLayout({}, 1, 1).parameter(0), InvalidArgument);
}

}  // namespace
}  // namespace mics
