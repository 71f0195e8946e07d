// The states of a unit's parameters and gradients: what they may go through, and nothing else.
#include "mics/unit.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

constexpr int64_t kNumel = 8;

struct OneUnit {
  OneUnit() {
    options.name = "layer";
    at::Tensor sharded = at::zeros({kNumel});
    sharded.requires_grad_(true);
    options.shard = sharded.detach();
    options.gradient = at::zeros({kNumel});
    options.parameters = {{"weight", {kNumel}, sharded, options.gradient}};
    unit = std::make_unique<Unit>(options, UnitCommunicators());
    at::Tensor full = unit->parameters().full_views()[0];
    full.requires_grad_(true);
    unit->parameters().set_full({full});
  }
  UnitParameters& parameters() { return unit->parameters(); }
  UnitGradients& gradients() { return unit->gradients(); }

  UnitOptions options;
  std::unique_ptr<Unit> unit;
};

TEST(UnitParameters, ModulesHoldTheFullOnesBetweenTwoRegistrations) {
  OneUnit one;
  std::vector<ParameterKind> registered;
  one.parameters().set_registration([&](ParameterKind kind) { registered.push_back(kind); });
  EXPECT_EQ(one.parameters().state(), ParameterState::kSharded);
  one.parameters().attach(one.options.shard);
  EXPECT_EQ(one.parameters().state(), ParameterState::kAttached);
  for (int i = 0; i < 2; ++i) one.parameters().register_parameters(ParameterKind::kFull);
  EXPECT_EQ(one.parameters().state(), ParameterState::kRegistered);
  for (int i = 0; i < 2; ++i) one.parameters().register_parameters(ParameterKind::kSharded);
  EXPECT_EQ(one.parameters().state(), ParameterState::kAttached);
  one.parameters().detach();
  one.parameters().detach();
  EXPECT_EQ(one.parameters().state(), ParameterState::kSharded);
  EXPECT_EQ(registered, (std::vector{ParameterKind::kFull, ParameterKind::kSharded}));
}

TEST(UnitParameters, OtherTransitionsAreDefects) {
  OneUnit one;
  EXPECT_THROW(one.parameters().register_parameters(ParameterKind::kFull), InternalError);
  one.parameters().attach(one.options.shard);
  EXPECT_THROW(one.parameters().attach(one.options.shard), InternalError);
  one.parameters().register_parameters(ParameterKind::kFull);
  EXPECT_THROW(one.parameters().detach(), InternalError);
  EXPECT_THROW(one.parameters().attach(one.options.shard), InternalError);
}

TEST(UnitParameters, RegistrationThatThrowsLeavesTheStateAsItWas) {
  OneUnit one;
  one.parameters().set_registration([](ParameterKind) { throw InvalidArgument("replaced"); });
  one.parameters().attach(one.options.shard);
  EXPECT_THROW(one.parameters().register_parameters(ParameterKind::kFull), InvalidArgument);
  EXPECT_EQ(one.parameters().state(), ParameterState::kAttached);
  one.parameters().detach();
}

TEST(UnitGradients, SumsOfAStepAreAccumulatedSynchronizedAndPublished) {
  OneUnit one;
  EXPECT_EQ(one.gradients().state(), GradientState::kNone);
  one.gradients().new_accumulated().fill_(2);
  EXPECT_EQ(one.gradients().state(), GradientState::kAccumulated);
  one.gradients().note_synchronized();
  EXPECT_EQ(one.gradients().state(), GradientState::kSynchronized);
  // A gradient that comes after the unit's reduction is summed apart.
  at::Tensor late = one.gradients().new_accumulated().fill_(3);
  EXPECT_EQ(one.gradients().state(), GradientState::kBoth);
  one.gradients().synchronized().add_(late);
  one.gradients().note_synchronized();
  one.gradients().publish({true});
  EXPECT_EQ(one.gradients().state(), GradientState::kNone);
  EXPECT_TRUE(at::equal(one.options.parameters[0].sharded.grad(), at::full({kNumel}, 5.0)));
}

TEST(UnitGradients, BlockCountsAsAccumulatedUntilItsSumIsMade) {
  OneUnit one;
  one.gradients().set_has_block(true);
  one.gradients().set_has_block(true);
  EXPECT_TRUE(has_accumulated(one.gradients().state()));
  (void)one.gradients().new_accumulated();
  one.gradients().set_has_block(false);
  EXPECT_TRUE(has_accumulated(one.gradients().state()));
  one.gradients().note_synchronized();
  EXPECT_FALSE(has_accumulated(one.gradients().state()));
}

TEST(UnitGradients, OtherTransitionsAreDefects) {
  OneUnit one;
  EXPECT_THROW(one.gradients().note_synchronized(), InternalError);  // nothing was accumulated
  (void)one.gradients().new_accumulated();
  one.gradients().note_synchronized();
  (void)one.gradients().new_accumulated();
  EXPECT_THROW(one.gradients().publish({true}), InternalError);  // a part is not synchronized
}

TEST(UnitGradients, DropGoesToNoneFromEveryState) {
  OneUnit one;
  const auto accumulate = [&] { (void)one.gradients().new_accumulated(); };
  const auto expect_dropped = [&] {
    one.gradients().drop();
    EXPECT_EQ(one.gradients().state(), GradientState::kNone);
    EXPECT_FALSE(one.gradients().is_accumulating());
  };
  expect_dropped();
  accumulate();
  expect_dropped();
  accumulate();
  one.gradients().note_synchronized();
  expect_dropped();
  accumulate();
  one.gradients().note_synchronized();
  accumulate();
  one.gradients().defer();
  expect_dropped();
}

}  // namespace
}  // namespace mics
