// The runtime orders everything that conflicts, by events alone: proven on recorded schedules, and
// the proof is shown to notice every edge that is missing.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <gtest/gtest.h>

#include <set>

#include "runtime/gather_pipeline.h"
#include "runtime/reduce_pipeline.h"
#include "runtime/runtime_memory.h"
#include "support/chain_model.h"
#include "support/schedule_recorder.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MICS_STRIDE 16  // of the sweep: one thread and no raw memory, so little for a sanitizer
#else
#define MICS_STRIDE 1
#endif

namespace mics {
namespace {

using testing::Model;
using testing::ScheduleRecorder;
using testing::World;

struct Case {
  World world;
  int num_layers;
  int num_microsteps;
  ResidencySettings residency;
  Depths depths;
  [[nodiscard]] std::string describe() const {
    std::ostringstream text;
    text << world.num_nodes << " nodes x " << world.ranks_per_node << ", p " << world.partition_size
         << (world.hierarchical ? " hierarchical" : " flat") << ", layers " << num_layers << ", s "
         << num_microsteps << ", residency " << static_cast<int>(residency.after_forward)
         << static_cast<int>(residency.between_microsteps)
         << static_cast<int>(residency.gradient_accumulation) << ", depths " << depths.intra
         << depths.rail << depths.reductions;
    return text.str();
  }
};

// Two training steps of one rank; the optimizer, between them, writes shards and reads gradients.
void train(const Case& what, int rank, ScheduleRecorder& recorder) {
  const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              streams, what.world, rank, what.num_layers, what.residency, what.depths);
  std::vector<int> inner;
  for (int layer = 1; layer < what.num_layers; ++layer) inner.push_back(layer);
  for (int step = 0; step < 2; ++step) {
    for (int microstep = 0; microstep < what.num_microsteps; ++microstep) {
      for (int layer = 0; layer < what.num_layers; ++layer) {
        model.unit(layer).settings().synchronize_gradients = microstep == what.num_microsteps - 1;
      }
      model.forward_nested(testing::batch(rank, microstep), inner).sum().backward();
    }
    for (int layer = 0; layer < what.num_layers; ++layer) {
      const at::Tensor& sharded = model.sharded(layer);
      if (sharded.grad().defined()) streams->compute->note_read(sharded.grad(), "optimizer");
      const c10::InferenceMode no_inference(false);
      const c10::NoGradGuard no_grad;
      sharded.mul_(0.5);
      streams->compute->note_write(sharded, "optimizer");
      sharded.mutable_grad().reset();
    }
  }
}

std::vector<World> worlds() {
  std::vector<World> found;
  for (const auto& [nodes, per_node] :
       {std::pair{1, 1}, {1, 2}, {1, 4}, {2, 1}, {2, 2}, {2, 3}, {2, 4}, {3, 2}, {4, 1}, {4, 2}}) {
    for (int p = 1; p <= nodes * per_node; ++p) {
      if (nodes * per_node % p != 0) continue;
      if (per_node % p != 0 && p % per_node != 0) continue;
      found.push_back({nodes, per_node, p, false});
      if (p > per_node && per_node > 1) found.push_back({nodes, per_node, p, true});
    }
  }
  return found;
}

std::vector<ResidencySettings> residencies(const World& world) {
  using enum Residency;
  std::vector<ResidencySettings> found = {
      {kShard, kShard, kShard}, {kFull, kShard, kShard}, {kFull, kFull, kShard}};
  if (world.hierarchical) {
    found.push_back({kBlock, kShard, kShard});
    found.push_back({kBlock, kBlock, kShard});
    found.push_back({kBlock, kBlock, kBlock});
    found.push_back({kShard, kShard, kBlock});
    found.push_back({kFull, kFull, kBlock});
  }
  return found;
}

std::vector<Case> sweep() {
  std::vector<Case> found;
  for (const World& world : worlds()) {
    for (const ResidencySettings& residency : residencies(world)) {
      for (const int num_layers : {1, 2, 5}) {
        for (const int num_microsteps : {1, 3}) {
          for (const Depths& depths : {Depths{1, 2, 2}, Depths{0, 0, 1}, Depths{2, 3, 3}}) {
            found.push_back({world, num_layers, num_microsteps, residency, depths});
          }
        }
      }
    }
  }
  return found;
}

// Operations by group, without the group's number and members: those of another rank must be the
// same.
std::vector<std::string> operations(const FlightLog& log) {
  std::map<std::string, std::string> by_group;
  for (const LoggedOperation& operation : log.operations()) {
    const std::string name = operation.group.substr(0, operation.group.find(" ["));
    const size_t direction = name.find('/');
    by_group[direction == std::string::npos ? name : name.substr(direction)] +=
        operation.op + " " + operation.unit + " " + std::to_string(operation.nbytes) + "\n";
  }
  std::vector<std::string> found;
  for (const auto& [group, text] : by_group) found.push_back(group + "\n" + text);
  return found;
}

TEST(ScheduleChecker, EverythingThatConflictsIsOrderedOnEveryShape) {
  const std::vector<Case> cases = sweep();
  ASSERT_GE(cases.size(), 2000u);
  for (size_t i = 0; i < cases.size(); i += MICS_STRIDE) {
    ScheduleRecorder first;
    train(cases[i], 0, first);
    ASSERT_EQ(first.race(), "") << cases[i].describe();
    const int last = cases[i].world.size() - 1;
    if (last == 0) continue;
    ScheduleRecorder other;
    train(cases[i], last, other);
    ASSERT_EQ(operations(first.log()), operations(other.log())) << cases[i].describe();
  }
}

// Leaves out one wait or record after the other, and delays one write of compute after the other.
// Each is noticed, or another path of events orders the same: then it is one of the few kinds of
// which that is known.
TEST(ScheduleChecker, MissingEdgeIsNoticed) {
  using enum Residency;
  std::map<std::string, RaceDetector::Noticed> noticed;
  const std::vector<Case> cases = {
      {{2, 2, 4, true}, 5, 3, {kShard, kShard, kShard}, {}},
      {{2, 2, 4, true}, 5, 3, {kBlock, kBlock, kBlock}, {}},
      {{2, 2, 4, true}, 5, 3, {kShard, kShard, kBlock}, {2, 3, 1}},
      {{2, 2, 4, false}, 5, 2, {kShard, kShard, kShard}, {}},
      {{4, 2, 4, true}, 5, 2, {kFull, kShard, kShard}, {}},
      {{2, 2, 2, false}, 5, 2, {kShard, kShard, kShard}, {0, 0, 1}},
  };
  for (const Case& what : cases) {
    ScheduleRecorder recorder;
    train(what, 0, recorder);
    ASSERT_EQ(recorder.race(), "") << what.describe();
    for (const auto& [kind, counts] : recorder.detector().put_defects(1)) {
      noticed[kind].noticed += counts.noticed;
      noticed[kind].all += counts.all;
    }
  }
  const std::set<std::string> kinds = {
      "compute does not wait for gather_intra",
      "compute does not wait for replicate",
      "compute does not wait for reduce_intra",
      "gather_rail does not wait for compute",
      "gather_intra does not wait for compute",
      "gather_rail does not wait for gather_intra",
      "gather_intra does not wait for gather_rail",
      "reduce_intra does not wait for compute",
      "reduce_rail does not wait for reduce_intra",
      "replicate does not wait for reduce_rail",
      "replicate does not wait for reduce_intra",
      "compute does not record",
      "compute writes late",
      "gather_rail does not record",
      "gather_intra does not record",
      "reduce_intra does not record",
      "reduce_rail does not record",
      "replicate does not record",
  };
  for (const auto& [kind, counts] : noticed) {
    std::cout << kind << ": " << counts.noticed << " of " << counts.all << " matter\n";
    if (kinds.count(kind) == 0) continue;
    EXPECT_GT(counts.noticed, 0) << kind;
  }
  for (const std::string& kind : kinds) EXPECT_EQ(noticed.count(kind), 1u) << kind;
}

constexpr World kTwoNodes = {2, 2, 4, true};

// A write that moves no version counter, as those of foreach and fused optimizers do.
TEST(ScheduleChecker, WriteThatNothingShowsIsOrderedBeforeTheNextGather) {
  ScheduleRecorder recorder;
  const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              streams, kTwoNodes, 0, 3, {}, {});
  for (int step = 0; step < 3; ++step) {
    model.forward_nested(testing::batch(0, 0)).sum().backward();
    for (int layer = 0; layer < 3; ++layer) {
      const at::AutoDispatchBelowADInplaceOrView no_version;
      const c10::NoGradGuard no_grad;
      model.sharded(layer).mul_(0.5);
      streams->compute->note_write(model.sharded(layer), "optimizer");
      model.sharded(layer).mutable_grad().reset();
    }
  }
  EXPECT_EQ(recorder.race(), "");
}

// An allocation is a write of compute: the allocator gives out what compute may still read.
TEST(ScheduleChecker, GatherIntoAGrownSlotWaitsForCompute) {
  ScheduleRecorder recorder;
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              recorder.make_streams(), kTwoNodes, 0, 3, {}, {0, 0, 1});
  for (int layer = 0; layer < 3; ++layer) model.engine().unshard(layer);
  EXPECT_GT(model.engine().memory().num_grown(), 0);
  EXPECT_EQ(recorder.race(), "");
}

// Gathers that nobody waits for work in memory that goes back to the allocator.
TEST(ScheduleChecker, GrownMemoryIsFreedAfterItsLastUse) {
  for (const World& world : {kTwoNodes, World{1, 4, 4, false}}) {
    ScheduleRecorder recorder;
    Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
                recorder.make_streams(), world, 0, 4, {}, {0, 0, 1});
    for (int layer = 0; layer < 4; ++layer) model.engine().prefetch(layer);
    for (int layer = 0; layer < 4; ++layer) model.engine().reshard(layer);
    for (int layer = 0; layer < 4; ++layer) model.engine().unshard(layer);
    for (int layer = 0; layer < 4; ++layer) model.engine().reshard(layer);
    EXPECT_GT(model.engine().memory().num_grown(), 0);
    EXPECT_EQ(recorder.race(), "");
  }
}

// Node blocks that were not planned for go back to the allocator after hop 2, or without one.
TEST(ScheduleChecker, GrownNodeBlocksAreFreedAfterTheirLastUse) {
  for (const bool has_hop_2 : {true, false}) {
    ScheduleRecorder recorder;
    const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
    Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
                streams, kTwoNodes, 0, 4, {}, {});
    const std::vector<std::shared_ptr<Unit>>& units = model.engine().units();
    StepDigest digest;
    RuntimeMemory memory(units, {0, 0, 1}, *streams->compute, 0);
    GatherPipeline gathers(units, *streams, digest);
    gathers.set_memory(&memory);
    gathers.begin_forward(/*is_new=*/true, /*records=*/false);
    for (int layer = 1; layer < 4; ++layer) {
      ASSERT_TRUE(gathers.start_rail(layer, /*may_grow=*/true));
    }
    EXPECT_EQ(memory.num_grown(), 2);
    for (int layer = 1; layer < 4 && has_hop_2; ++layer) gathers.finish(layer);
    gathers.drop_unused();
    EXPECT_EQ(recorder.race(), "");
  }
}

// A reduction whose block was not planned for.
TEST(ScheduleChecker, GrownBlockIsUsedAfterItsAllocation) {
  ScheduleRecorder recorder;
  const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              streams, kTwoNodes, 0, 2, {}, {});
  RuntimeMemory memory(model.engine().units(), {}, *streams->compute, 0);
  Stream& stream = *streams->reduce_intra;
  const at::Tensor block = memory.reduce_block(0, 1 << 16, at::kFloat, stream);
  stream.note_write(block, "reduce_scatter");
  EXPECT_EQ(recorder.race(), "");
}

// `.grad` is kept from the step before, so the sum of this one needs other memory, which is filled.
TEST(ScheduleChecker, SumBesideAVisibleGradientIsOrderedAfterItsFill) {
  for (const Residency accumulation : {Residency::kShard, Residency::kBlock}) {
    ScheduleRecorder recorder;
    Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
                recorder.make_streams(), kTwoNodes, 0, 3,
                {Residency::kShard, Residency::kShard, accumulation}, {});
    for (int step = 0; step < 3; ++step) {
      model.forward_nested(testing::batch(0, step)).sum().backward();
    }
    EXPECT_EQ(recorder.race(), "");
  }
}

TEST(ScheduleChecker, LateGradientIsOrderedAfterHop2OfTheBlock) {
  ScheduleRecorder recorder;
  const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              streams, kTwoNodes, 0, 2, {Residency::kShard, Residency::kShard, Residency::kBlock},
              {});
  const std::vector<std::shared_ptr<Unit>>& units = model.engine().units();
  StepDigest digest;
  RuntimeMemory memory(units, {}, *streams->compute, 0);
  ReducePipeline reduces(units, {}, *streams, digest);
  reduces.set_memory(&memory);
  for (int late = 0; late < 2; ++late) {
    units[1]->parameters().full(0).mutable_grad() = at::ones({testing::kWidth, testing::kWidth});
    reduces.reduce(1);
    reduces.synchronize(1);
  }
  reduces.wait(1);
  EXPECT_EQ(recorder.race(), "");
}

// A third sum has memory of its own: it is freed when it was added, but not while it is read.
TEST(ScheduleChecker, SumThatIsAddedOutlivesItsReader) {
  ScheduleRecorder recorder;
  const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              streams, kTwoNodes, 0, 2, {}, {});
  const std::vector<std::shared_ptr<Unit>>& units = model.engine().units();
  StepDigest digest;
  RuntimeMemory memory(units, {}, *streams->compute, 0);
  ReducePipeline reduces(units, {}, *streams, digest);
  reduces.set_memory(&memory);
  model.sharded(1).mutable_grad() = at::zeros_like(model.sharded(1));  // kept by the user
  for (int late = 0; late < 3; ++late) {
    units[1]->parameters().full(0).mutable_grad() = at::ones({testing::kWidth, testing::kWidth});
    reduces.reduce(1);
    reduces.synchronize(1);
  }
  reduces.wait(1);
  EXPECT_EQ(recorder.race(), "");
}

// Dropping what is being reduced must not give its memory to compute meanwhile.
TEST(ScheduleChecker, DroppedSumIsNotWrittenAnyMore) {
  ScheduleRecorder recorder;
  const std::shared_ptr<RuntimeStreams> streams = recorder.make_streams();
  Model model([&](GroupInfo group) { return recorder.make_communicator(std::move(group)); },
              streams, kTwoNodes, 0, 2, {}, {});
  for (int layer = 0; layer < 2; ++layer) {
    model.unit(layer).settings().synchronize_gradients = false;
  }
  model.forward_nested(testing::batch(0, 0), {1}).sum().backward();
  const at::Tensor sum = model.unit(1).gradients().accumulated();
  model.engine().drop_gradients(1);
  streams->compute->note_write(sum, "the user's own write");
  EXPECT_EQ(recorder.race(), "");
}

// Of two ranks, one issues two operations of a communicator the other way round.
TEST(ScheduleChecker, SwappedLaunchesAreNoticed) {
  const Case what = {{2, 2, 4, true}, 5, 2, {}, {}};
  ScheduleRecorder recorder;
  train(what, 0, recorder);
  const std::vector<LoggedOperation> logged = recorder.log().operations();
  int num_swaps = 0;
  for (size_t i = 0; i < logged.size(); ++i) {
    size_t next = i + 1;
    while (next < logged.size() && logged[next].group != logged[i].group) ++next;
    if (next == logged.size() || logged[next].unit == logged[i].unit) continue;
    FlightLog swapped(logged.size());
    for (size_t k = 0; k < logged.size(); ++k) {
      const LoggedOperation& from = logged[k == i ? next : (k == next ? i : k)];
      (void)swapped.issue(from.group, from.op, from.unit, from.nbytes);
    }
    ++num_swaps;
    EXPECT_NE(operations(swapped), operations(recorder.log()));
  }
  EXPECT_GT(num_swaps, 50);
}

}  // namespace
}  // namespace mics
