#include "optim/storage_part.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

TEST(StoragePart, ReadsAndWritesTheBufferAndHasAStorageOfItsOwn) {
  const at::Tensor buffer = at::arange(10, at::kFloat);
  const at::Tensor part = make_part(buffer, 3, {2, 2});
  EXPECT_TRUE(at::equal(part, at::arange(3, 7, at::kFloat).view({2, 2})));
  EXPECT_EQ(part.storage_offset(), 0);
  EXPECT_EQ(part.storage().nbytes(), 4 * sizeof(float));
  EXPECT_EQ(part.const_data_ptr(), buffer.narrow(0, 3, 1).const_data_ptr());
  part.fill_(-1);
  EXPECT_EQ(buffer[6].item<float>(), -1);
  EXPECT_EQ(buffer[7].item<float>(), 7);
}

TEST(StoragePart, KeepsTheMemoryOfItsBufferAlive) {
  at::Tensor part;
  {
    const at::Tensor buffer = at::full({1000}, 5.0F);
    part = make_part(make_part(buffer, 10, {900}), 890, {10});
  }
  EXPECT_EQ(part.sum().item<float>(), 50);
}

TEST(StoragePart, NothingMayLieOutsideOfTheBuffer) {
  const at::Tensor buffer = at::zeros({4});
  EXPECT_THROW((void)make_part(buffer, 2, {3}), InternalError);
  EXPECT_THROW((void)make_part(buffer, -1, {1}), InternalError);
  EXPECT_EQ(make_part(buffer, 4, {0, 3}).numel(), 0);
}

TEST(StoragePart, DistancesAreThoseInTheBuffer) {
  const at::Tensor buffer = at::zeros({20});
  const at::Tensor first = make_part(buffer, 2, {3});
  EXPECT_EQ(distance_between(first, make_part(buffer, 5, {2, 2})), 3);
  EXPECT_EQ(distance_between(make_part(buffer, 5, {1}), first), -3);
  EXPECT_EQ(distance_between(first, make_part(buffer, 20, {0})), 18);
  // A view of a part, a part of a view, and the buffer itself.
  EXPECT_EQ(distance_between(first, make_part(buffer, 8, {6}).narrow(0, 1, 2)), 7);
  EXPECT_EQ(distance_between(first, make_part(buffer.narrow(0, 10, 10), 1, {2})), 9);
  EXPECT_EQ(distance_between(buffer, first), 2);
  // Another buffer, another dtype, gaps.
  EXPECT_EQ(distance_between(first, make_part(at::zeros({9}), 0, {3})), std::nullopt);
  EXPECT_EQ(distance_between(first, buffer.view(at::kInt)), std::nullopt);
  EXPECT_EQ(distance_between(first, make_part(buffer, 0, {2, 2}).t()), std::nullopt);
}

TEST(StoragePart, SpanReachesOverThePartsBehind) {
  const at::Tensor buffer = at::arange(10, at::kFloat);
  const at::Tensor span = span_from(make_part(buffer, 3, {2}), 6);
  EXPECT_TRUE(at::equal(span, at::arange(3, 9, at::kFloat)));
  span.zero_();
  EXPECT_EQ(buffer.sum().item<float>(), 0 + 1 + 2 + 9);
  EXPECT_TRUE(at::equal(span_from(buffer.narrow(0, 8, 1), 2), buffer.narrow(0, 8, 2)));
}

TEST(StoragePart, OnTheMetaDeviceIsATensorOfItsOwn) {
  const at::Tensor buffer = at::empty({10}, at::device(at::kMeta));
  const at::Tensor part = make_part(buffer, 3, {2, 2});
  EXPECT_TRUE(part.is_meta());
  EXPECT_EQ(part.storage_offset(), 0);
}

}  // namespace
}  // namespace mics
