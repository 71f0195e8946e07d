#include "mics/model/memory_model.h"

#include <gtest/gtest.h>

#include "mics/error.h"

namespace mics {
namespace {

Cluster nodes_of(int ranks_per_node) {
  Cluster cluster;
  cluster.machine.ranks_per_node = ranks_per_node;
  return cluster;
}

MemoryLimits v100() {
  MemoryLimits limits;
  limits.capacity_nbytes = 34.1e9;
  limits.context_nbytes = 0.9e9;
  limits.communicator_nbytes = 0.1e9;
  return limits;
}

Workload bert(int64_t hidden, int64_t layers) {
  TransformerShape shape;
  shape.hidden = hidden;
  shape.layers = layers;
  shape.heads = 40;
  shape.vocabulary = 32008;
  shape.sequence = 512;
  return transformer_workload(shape);
}

StepSettings paper_settings(int world_size, int partition_size) {
  StepSettings settings;
  settings.world_size = world_size;
  settings.partition_size = partition_size;
  settings.gather = Variant::kHierarchical;
  settings.micro_batch = 8;
  settings.num_microsteps = 4;
  settings.recompute = true;
  return settings;
}

// What ran and what was out of memory on 32 GB in the MiCS paper: whole nodes, micro-batch 8.
TEST(StepMemory, EqualsTheMapOfThePaper) {
  const struct {
    int64_t hidden, layers;
    int smallest;
  } models[] = {{2560, 127, 8}, {2560, 190, 16}, {5120, 64, 16}, {8192, 62, 64}};
  for (const auto& model : models) {
    for (const int p : {8, 16, 32, 64, 128}) {
      const MemoryTerms terms = step_memory(bert(model.hidden, model.layers), nodes_of(8),
                                            paper_settings(128, p), v100());
      EXPECT_EQ(fits(terms, v100()), p >= model.smallest)
          << "hidden=" << model.hidden << " p=" << p << " peak=" << terms.peak / 1e9 << " GB";
    }
  }
}

// ZeRO-2 at micro-batch 4: parameters whole, buckets of 5e8 elements, twice; 10B from 32 GPUs on.
TEST(StepMemory, EqualsTheMapOfZero2) {
  MemoryLimits limits = v100();
  limits.state_nbytes = 14;
  limits.bucket_nbytes = 2e9;
  for (const int64_t layers : {127, 190}) {
    for (const int n : {16, 32, 64, 128}) {
      StepSettings settings = paper_settings(n, n);
      settings.micro_batch = 4;
      settings.gather = Variant::kFlat;
      settings.residency = {Residency::kFull, Residency::kFull, Residency::kShard};
      const MemoryTerms terms = step_memory(bert(2560, layers), nodes_of(8), settings, limits);
      EXPECT_EQ(fits(terms, limits), layers == 127 && n >= 32)
          << "layers=" << layers << " n=" << n << " peak=" << terms.peak / 1e9 << " GB";
    }
  }
}

// 4 units of 1000 parameters on 4 ranks of 2 nodes.
class SmallMemory : public ::testing::Test {
 protected:
  SmallMemory() {
    workload_.units = {{.name = "unit",
                        .num_units = 4,
                        .numel = 1000,
                        .saved_nbytes = 50,
                        .input_nbytes = 5,
                        .transient_nbytes = 7}};
    settings_.world_size = settings_.partition_size = 4;
    settings_.gather = settings_.reduce = Variant::kHierarchical;
    settings_.micro_batch = 3;
    settings_.num_microsteps = 2;
    limits_.capacity_nbytes = 1e6;
  }

  MemoryTerms terms() const { return step_memory(workload_, nodes_of(2), settings_, limits_); }

  Workload workload_;
  StepSettings settings_;
  MemoryLimits limits_;
};

TEST_F(SmallMemory, HasEachTerm) {
  const MemoryTerms shards = terms();
  EXPECT_EQ(shards.states, 16 * 4000 / 4);
  EXPECT_EQ(shards.parameters_kept, 0);
  EXPECT_EQ(shards.gradients_kept, 0);
  EXPECT_EQ(shards.gathered, 2 * 2000);
  EXPECT_EQ(shards.staging, 3 * 2000 / 2);
  EXPECT_EQ(shards.unit_gradients, 2000);
  EXPECT_EQ(shards.activations, 3 * 4 * 50);
  EXPECT_EQ(shards.recomputation, 0);
  EXPECT_EQ(shards.head, 21);
  EXPECT_EQ(shards.peak, 16000 + 4000 + 3000 + 2000 + 600);
  settings_.recompute = true;
  EXPECT_EQ(terms().activations, 3 * 4 * 5);
  EXPECT_EQ(terms().recomputation, 3 * 50);
}

TEST_F(SmallMemory, KeepsBlocksOrEverything) {
  settings_.residency = {Residency::kShard, Residency::kBlock, Residency::kBlock};
  const MemoryTerms blocks = terms();
  EXPECT_EQ(blocks.parameters_kept, 8000 / 2);
  EXPECT_EQ(blocks.gradients_kept, 16000 / 2);
  EXPECT_EQ(blocks.staging, 0);
  settings_.residency = {Residency::kFull, Residency::kFull, Residency::kFull};
  const MemoryTerms full = terms();
  EXPECT_EQ(full.parameters_kept, 8000);
  EXPECT_EQ(full.gradients_kept, 16000);
  EXPECT_EQ(full.gathered, 0);
}

TEST_F(SmallMemory, PeaksAtTheEndOfForwardWhenTheHeadIsLarge) {
  workload_.units[0].transient_nbytes = 1e4;
  const MemoryTerms memory = terms();
  EXPECT_EQ(memory.peak, memory.forward_end);
  EXPECT_LT(memory.backward, memory.peak);
}

TEST_F(SmallMemory, CountsCommunicatorsByGroupAndDirection) {
  const Machine machine = nodes_of(2).machine;
  EXPECT_EQ(count_communicators(machine, settings_), 2 + 2 + 1);
  settings_.reduce = Variant::kFlat;
  settings_.world_size = 8;
  EXPECT_EQ(count_communicators(machine, settings_), 2 + 1 + 1 + 1);
  settings_.partition_size = 1;
  EXPECT_EQ(count_communicators(machine, settings_), 2);
  settings_.world_size = 1;
  EXPECT_EQ(count_communicators(machine, settings_), 0);
  settings_.world_size = settings_.partition_size = 4;
  limits_.context_nbytes = 100;
  limits_.communicator_nbytes = 10;
  EXPECT_EQ(terms().communicators, 100 + 10 * (2 + 1 + 1));
}

TEST_F(SmallMemory, RefusesLimitsThatAreNone) {
  limits_.usable = 1.5;
  EXPECT_THROW((void)terms(), InvalidArgument);
  limits_ = {};
  EXPECT_THROW((void)terms(), InvalidArgument);
  limits_.capacity_nbytes = 1;
  limits_.context_nbytes = -1;
  EXPECT_THROW((void)terms(), InvalidArgument);
}

}  // namespace
}  // namespace mics
