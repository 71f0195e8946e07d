#include "plan/check.h"

#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

TEST(Check, ThrowsInvalidArgumentWithAllParts) {
  try {
    MICS_CHECK(1 + 1 == 3, "sums must be right: got a=", 1, ", b=", 1.5, ".");
    FAIL() << "did not throw";
  } catch (const InvalidArgument& error) {
    EXPECT_STREQ(error.what(), "sums must be right: got a=1, b=1.5.");
  }
}

TEST(Check, DoesNotEvaluatePartsWhenTrue) {
  int evaluated = 0;
  MICS_CHECK(true, ++evaluated);
  EXPECT_EQ(evaluated, 0);
}

TEST(Check, InternalErrorNamesConditionAndPlace) {
  try {
    MICS_INTERNAL_CHECK(false, "lost a unit.");
    FAIL() << "did not throw";
  } catch (const InternalError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("lost a unit."), std::string::npos);
    EXPECT_NE(text.find("check_test.cc"), std::string::npos);
    EXPECT_NE(text.find("false is false"), std::string::npos);
  }
}

TEST(Check, JoinsLegalValues) {
  EXPECT_EQ(join_or({}), "none");
  EXPECT_EQ(join_or({4}), "4");
  EXPECT_EQ(join_or({1, 2, 4}), "1, 2 or 4");
}

}  // namespace
}  // namespace mics
