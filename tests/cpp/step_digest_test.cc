#include "runtime/step_digest.h"

#include <gtest/gtest.h>

#include <array>

namespace mics {
namespace {

TEST(StepDigest, SumsTellWhetherAllAreEqual) {
  StepDigest first, second;
  first.note(StepDigest::Launch::kReduce, 1);
  second.note(StepDigest::Launch::kReduce, 2);
  const auto sums = [](const std::vector<const StepDigest*>& ranks) {
    std::array<int64_t, StepDigest::kNumWords> sum = {}, own = {};
    for (const StepDigest* rank : ranks) {
      rank->write(own.data());
      for (size_t i = 0; i < sum.size(); ++i) sum[i] += own[i];
    }
    return sum;
  };
  for (int num_ranks = 2; num_ranks <= 5; ++num_ranks) {
    std::vector<const StepDigest*> ranks(static_cast<size_t>(num_ranks), &first);
    EXPECT_TRUE(StepDigest::are_equal(sums(ranks).data(), num_ranks));
    ranks.back() = &second;
    EXPECT_FALSE(StepDigest::are_equal(sums(ranks).data(), num_ranks));
  }
}

}  // namespace
}  // namespace mics
