#include "plan/schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

namespace mics {
namespace {

constexpr ActionKind kGather = ActionKind::kGather;
constexpr ActionKind kGatherAgain = ActionKind::kGatherAgain;
constexpr ActionKind kReduce = ActionKind::kReduce;
constexpr ActionKind kReshard = ActionKind::kReshard;
using Actions = std::vector<Action>;

Actions only(const Actions& actions, ActionKind kind) {
  Actions kept;
  std::copy_if(actions.begin(), actions.end(), std::back_inserter(kept),
               [kind](const Action& action) { return action.kind == kind; });
  return kept;
}

void append(Actions& to, const Actions& from) { to.insert(to.end(), from.begin(), from.end()); }

// Root 0 around blocks 1 .. num_blocks. Returns the calls; index = unit.
std::vector<int64_t> record_chain(Schedule& schedule, Tape& tape, int num_blocks) {
  std::vector<int64_t> calls = {schedule.begin_call(tape, 0)};
  for (int block = 1; block <= num_blocks; ++block) {
    calls.push_back(schedule.begin_call(tape, block));
    schedule.end_call(tape, calls.back(), block);
  }
  schedule.end_call(tape, calls[0], 0);
  return calls;
}

TEST(Schedule, ReducesAUnitWhenBackwardMovesOnAndTheRootLast) {
  Schedule schedule(3);
  const auto tape = schedule.new_tape();
  const std::vector<int64_t> calls = record_chain(schedule, *tape, 2);
  EXPECT_EQ(schedule.enter_backward(tape, calls[0], 0, 7), (Actions{{kGather, 0}}));
  EXPECT_EQ(schedule.enter_backward(tape, calls[2], 2, 7), (Actions{{kGather, 2}}));
  EXPECT_EQ(schedule.enter_backward(tape, calls[1], 1, 7),
            (Actions{{kReduce, 2}, {kReshard, 2}, {kGather, 1}}));
  EXPECT_EQ(schedule.finish_backward(),
            (Actions{{kReduce, 1}, {kReshard, 1}, {kReduce, 0}, {kReshard, 0}}));
  EXPECT_EQ(schedule.finish_backward(), Actions{});
}

TEST(Schedule, CollectivesAreTheSameWhateverUnitsGetNoGradientOnThisRank) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 500; ++trial) {
    const int num_blocks = std::uniform_int_distribution<int>(1, 8)(random);
    Actions reference;
    for (int rank = 0; rank < 3; ++rank) {
      Schedule schedule(num_blocks + 1);
      const auto tape = schedule.new_tape();
      const std::vector<int64_t> calls = record_chain(schedule, *tape, num_blocks);
      Actions actions = schedule.enter_backward(tape, calls[0], 0, 1);
      for (int block = num_blocks; block >= 1; --block) {
        // Rank 0 runs all backwards, the others a random part.
        if (rank > 0 && random() % 2 == 0) continue;
        append(actions, schedule.enter_backward(tape, calls[static_cast<size_t>(block)], block, 1));
      }
      append(actions, schedule.finish_backward());
      std::erase_if(actions, [](const Action& action) { return action.kind == kReshard; });
      if (rank == 0) reference = actions;
      ASSERT_EQ(actions, reference) << "trial " << trial << " rank " << rank;
    }
  }
}

TEST(Schedule, EachUnitIsReducedOncePerBackwardHoweverOftenItIsCalled) {
  Schedule schedule(2);
  const auto tape = schedule.new_tape();
  const int64_t root = schedule.begin_call(*tape, 0);
  std::vector<int64_t> calls;
  for (int i = 0; i < 3; ++i) {
    calls.push_back(schedule.begin_call(*tape, 1));
    schedule.end_call(*tape, calls.back(), 1);
  }
  schedule.end_call(*tape, root, 0);
  Actions actions = schedule.enter_backward(tape, root, 0, 1);
  for (int i = 2; i >= 0; --i) {
    append(actions, schedule.enter_backward(tape, calls[static_cast<size_t>(i)], 1, 1));
  }
  append(actions, schedule.finish_backward());
  EXPECT_EQ(only(actions, kReduce), (Actions{{kReduce, 1}, {kReduce, 0}}));
  EXPECT_EQ(only(actions, kReshard).size(), 4U);
}

TEST(Schedule, SecondOutputOfACallChangesNothing) {
  Schedule schedule(2);
  const auto tape = schedule.new_tape();
  const std::vector<int64_t> calls = record_chain(schedule, *tape, 1);
  (void)schedule.enter_backward(tape, calls[0], 0, 1);
  (void)schedule.enter_backward(tape, calls[1], 1, 1);
  EXPECT_EQ(schedule.enter_backward(tape, calls[1], 1, 1), (Actions{{kGatherAgain, 1}}));
  EXPECT_EQ(only(schedule.finish_backward(), kReduce), (Actions{{kReduce, 1}, {kReduce, 0}}));
}

TEST(Schedule, TwoForwardsWithOneLossReduceOnce) {
  Schedule schedule(1);
  const auto first = schedule.new_tape();
  const auto second = schedule.new_tape();
  const std::vector<int64_t> a = record_chain(schedule, *first, 0);
  const std::vector<int64_t> b = record_chain(schedule, *second, 0);
  Actions actions = schedule.enter_backward(second, b[0], 0, 1);
  append(actions, schedule.enter_backward(first, a[0], 0, 1));
  append(actions, schedule.finish_backward());
  EXPECT_EQ(only(actions, kReduce), (Actions{{kReduce, 0}}));
}

TEST(Schedule, TwoForwardsWithALossEachReduceInEachBackward) {
  for (const bool in_order : {true, false}) {
    Schedule schedule(1);
    const auto first = schedule.new_tape();
    const auto second = schedule.new_tape();
    const std::vector<int64_t> a = record_chain(schedule, *first, 0);
    const std::vector<int64_t> b = record_chain(schedule, *second, 0);
    for (const bool is_first : {in_order, !in_order}) {
      Actions actions = is_first ? schedule.enter_backward(first, a[0], 0, 1)
                                 : schedule.enter_backward(second, b[0], 0, 1);
      append(actions, schedule.finish_backward());
      EXPECT_EQ(only(actions, kReduce), (Actions{{kReduce, 0}}));
    }
  }
}

TEST(Schedule, DroppedGraphIsForgotten) {
  Schedule schedule(1);
  {
    const auto dropped = schedule.new_tape();
    (void)record_chain(schedule, *dropped, 0);
  }
  const auto tape = schedule.new_tape();
  const std::vector<int64_t> calls = record_chain(schedule, *tape, 0);
  (void)schedule.enter_backward(tape, calls[0], 0, 1);
  // Not put off to an earlier call, which would be on the dropped tape.
  EXPECT_EQ(schedule.finish_backward(), (Actions{{kReduce, 0}, {kReshard, 0}}));
}

TEST(Schedule, CancelledCallLeavesNoTrace) {
  Schedule schedule(2);
  const auto tape = schedule.new_tape();
  const int64_t root = schedule.begin_call(*tape, 0);
  const int64_t frozen = schedule.begin_call(*tape, 1);
  schedule.cancel_call(*tape, frozen);
  schedule.end_call(*tape, root, 0);
  Actions actions = schedule.enter_backward(tape, root, 0, 1);
  append(actions, schedule.finish_backward());
  EXPECT_EQ(actions, (Actions{{kGather, 0}, {kReduce, 0}, {kReshard, 0}}));
}

TEST(Schedule, UnusedRecomputationDoesNotReshardTheUnitThatRuns) {
  Schedule schedule(3);
  const auto tape = schedule.new_tape();
  // Unit 1 holds unit 2 and is checkpointed as a whole.
  const int64_t outer = schedule.begin_call(*tape, 1);
  const int64_t inner = schedule.begin_call(*tape, 2);
  schedule.end_call(*tape, inner, 2);
  schedule.end_call(*tape, outer, 1);
  (void)schedule.enter_backward(tape, outer, 1, 5);
  Actions actions;
  const int64_t outer_again = schedule.begin_recomputed_call(*tape, 1, 5, actions);
  const int64_t inner_again = schedule.begin_recomputed_call(*tape, 2, 5, actions);
  schedule.end_call(*tape, inner_again, 2);
  schedule.end_call(*tape, outer_again, 1);
  EXPECT_EQ(actions, Actions{});
  EXPECT_EQ(schedule.enter_backward(tape, inner, 2, 5), (Actions{{kGather, 2}}));
  EXPECT_EQ(schedule.finish_backward(),
            (Actions{{kReduce, 2}, {kReshard, 2}, {kReduce, 1}, {kReshard, 1}}));
}

TEST(Schedule, ReentrantRecomputationReducesEachBlockBeforeTheNextIsRecomputed) {
  Schedule schedule(3);
  const auto tape = schedule.new_tape();
  const int64_t root = schedule.begin_call(*tape, 0);
  schedule.end_call(*tape, root, 0);  // the blocks ran without recording
  (void)schedule.enter_backward(tape, root, 0, 1);
  Actions actions;
  for (int block = 2; block >= 1; --block) {
    const int64_t call = schedule.begin_recomputed_call(*tape, block, 1, actions);
    schedule.end_call(*tape, call, block);
    const int64_t nested_task = 10 - block;
    append(actions, schedule.enter_backward(tape, call, block, nested_task));
  }
  EXPECT_EQ(actions, (Actions{{kGather, 2}, {kReduce, 2}, {kReshard, 2}, {kGather, 1}}));
  EXPECT_EQ(only(schedule.finish_backward(), kReduce), (Actions{{kReduce, 1}, {kReduce, 0}}));
}

TEST(Schedule, GradientAfterTheCallWasPassedIsReducedAgain) {
  Schedule schedule(3);
  const auto tape = schedule.new_tape();
  const std::vector<int64_t> calls = record_chain(schedule, *tape, 2);
  (void)schedule.enter_backward(tape, calls[2], 2, 1);
  (void)schedule.enter_backward(tape, calls[1], 1, 1);
  EXPECT_EQ(schedule.enter_backward(tape, calls[2], 2, 1), (Actions{{kGatherAgain, 2}}));
  const Actions reduced = only(schedule.finish_backward(), kReduce);
  EXPECT_EQ(std::count(reduced.begin(), reduced.end(), Action{kReduce, 2}), 1);
}

TEST(Schedule, BackwardInsideAForwardLeavesOpenCallsAndReducesWhatTheyHave) {
  Schedule schedule(3);
  const auto tape = schedule.new_tape();
  const int64_t root = schedule.begin_call(*tape, 0);
  const int64_t first = schedule.begin_call(*tape, 1);
  schedule.end_call(*tape, first, 1);
  const int64_t second = schedule.begin_call(*tape, 2);  // backward of the first runs in here
  EXPECT_EQ(schedule.enter_backward(tape, first, 1, 7), (Actions{{kGather, 1}}));
  // The open ones have no more gradients to come, and stay as they are.
  EXPECT_EQ(schedule.finish_backward(),
            (Actions{{kReduce, 1}, {kReshard, 1}, {kReduce, 2}, {kReduce, 0}}));
  schedule.end_call(*tape, second, 2);
  schedule.end_call(*tape, root, 0);
  // And have a backward of their own.
  EXPECT_EQ(schedule.enter_backward(tape, root, 0, 8), (Actions{{kGather, 0}}));
  EXPECT_EQ(schedule.enter_backward(tape, second, 2, 8), (Actions{{kGather, 2}}));
  EXPECT_EQ(schedule.finish_backward(),
            (Actions{{kReduce, 2}, {kReshard, 2}, {kReduce, 0}, {kReshard, 0}}));
}

TEST(Schedule, LentUnitLastsAsLongAsTheOutermostOne) {
  Schedule schedule(3);
  const auto tape = schedule.new_tape();
  const int64_t root = schedule.begin_call(*tape, 0);
  const int64_t block = schedule.begin_call(*tape, 1);
  const int64_t lent = schedule.begin_lent_call(*tape, 2);  // read inside the block
  schedule.end_call(*tape, block, 1);
  schedule.end_call(*tape, lent, 2);
  schedule.end_call(*tape, root, 0);
  EXPECT_EQ(schedule.enter_backward(tape, lent, 2, 7), (Actions{{kGather, 0}, {kGather, 2}}));
  EXPECT_EQ(schedule.enter_backward(tape, root, 0, 7), (Actions{{kGatherAgain, 0}}));
  EXPECT_EQ(schedule.enter_backward(tape, block, 1, 7), (Actions{{kGather, 1}}));
  EXPECT_EQ(
      schedule.finish_backward(),
      (Actions{
          {kReduce, 1}, {kReshard, 1}, {kReduce, 2}, {kReshard, 2}, {kReduce, 0}, {kReshard, 0}}));
}

TEST(Schedule, LateUseIsReducedAtTheEnd) {
  Schedule schedule(2);
  const auto tape = schedule.new_tape();
  const std::vector<int64_t> calls = {schedule.begin_call(*tape, 0)};
  schedule.end_call(*tape, calls[0], 0);
  EXPECT_EQ(schedule.enter_backward(tape, calls[0], 0, 7), (Actions{{kGather, 0}}));
  schedule.note_late_use(1);
  EXPECT_EQ(schedule.finish_backward(),
            (Actions{{kReduce, 0}, {kReshard, 0}, {kReduce, 1}, {kReshard, 1}}));
}

}  // namespace
}  // namespace mics
