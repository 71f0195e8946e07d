// The cost model's bytes are those that the runtime counts, in every world of up to 8 ranks: for
// each partition size, variant, residency and number of micro-steps.
#include <c10/core/GradMode.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdlib>
#include <sstream>

#include "mics/model/cost_model.h"
#include "support/chain_model.h"
#include "support/multi_rank.h"

namespace mics {
namespace {

using testing::batch;
using testing::kNumLayers;
using testing::Model;
using testing::run_ranks;
using testing::World;

struct Case {
  ResidencySettings residency;
  int num_microsteps;
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kStride = 6;  // counts are what is tested here, and they do not depend on timing
#else
constexpr int kStride = 3;
#endif
constexpr Residency kResidencies[] = {Residency::kShard, Residency::kBlock, Residency::kFull};

// Every pair of forward, between, gradient and micro-steps; every combination with MICS_WIDE=1.
std::vector<Case> all_cases() {
  constexpr int kMicrosteps[] = {1, 2, 4};
  const bool is_wide = std::getenv("MICS_WIDE") != nullptr;
  std::vector<Case> cases;
  for (int forward = 0; forward < 3; ++forward) {
    // What is kept between micro-steps is kept after forward too, as the cost model has it.
    for (int between = 0; between <= forward; ++between) {
      for (int gradient = 0; gradient < 3; ++gradient) {
        for (int s = 0; s < 3; ++s) {
          if (!is_wide && (forward + between + gradient + s) % kStride != 0) continue;
          cases.push_back({{kResidencies[forward], kResidencies[between], kResidencies[gradient]},
                           kMicrosteps[s]});
        }
      }
    }
  }
  return cases;
}

// What one rank has received, or sent, by communicator.
using Bytes = std::array<int64_t, 5>;
constexpr const char* kNames[] = {"gather/rail", "gather/intra", "reduce/rail", "reduce/intra",
                                  "replicate"};

template <typename Nbytes>
Bytes count(Model& model, const Nbytes& nbytes) {
  return {nbytes(model.gather().rail()), nbytes(model.gather().intra()),
          nbytes(model.reduce().rail()), nbytes(model.reduce().intra()), nbytes(model.replicate())};
}
Bytes received(Model& model) {
  return count(model, [](const Traffic& traffic) {
    return traffic.received_intra_nbytes + traffic.received_inter_nbytes;
  });
}
Bytes sent(Model& model) {
  return count(model, [](const Traffic& traffic) {
    return traffic.sent_intra_nbytes + traffic.sent_inter_nbytes;
  });
}
Bytes operator-(const Bytes& a, const Bytes& b) {
  Bytes difference;
  for (size_t i = 0; i < a.size(); ++i) difference[i] = a[i] - b[i];
  return difference;
}

// One step of an optimizer that writes every shard before it: what was kept is gathered anew.
void run_step(Model& model, int rank, const Case& run) {
  for (int layer = 0; layer < kNumLayers; ++layer) {
    const c10::NoGradGuard no_grad;
    at::Tensor weight = model.sharded(layer);
    weight.mul_(1.0);
    model.unit(layer).settings().residency = run.residency;
  }
  for (int step = 0; step < run.num_microsteps; ++step) {
    const bool is_last = step == run.num_microsteps - 1;
    for (int layer = 0; layer < kNumLayers; ++layer) {
      UnitSettings& settings = model.unit(layer).settings();
      settings.synchronize_gradients = is_last;
      // Gradients that are kept full are reduced at the boundary.
      settings.reduce_gradients =
          is_last || run.residency.gradient_accumulation != Residency::kFull;
    }
    model.forward_nested(batch(rank, step)).sum().backward();
  }
}

Bytes predicted(const World& world, const Unit& unit, const Case& run) {
  TopologyOptions options;
  for (int rank = 0; rank < world.size(); ++rank) {
    options.node_of_rank.push_back(std::to_string(rank / world.ranks_per_node));
  }
  options.partition_size = world.partition_size;
  const Topology topology(options);
  const Variant variant = world.hierarchical ? Variant::kHierarchical : Variant::kFlat;
  UnitSize size;
  size.shard_numel = unit.parameters().layout().shard_numel();
  size.payload_numel = unit.parameters().layout().payload_numel();
  size.gradient_shard_numel = unit.gradients().layout().shard_numel();
  size.gradient_payload_numel = unit.gradients().layout().payload_numel();
  size.parameter_nbytes = 4;
  const int replicas = topology.replication_size();
  const StepBytes bytes = step_bytes(size, topology.shape(variant), replicas,
                                     count_hops(run.residency, run.num_microsteps, replicas));
  return {bytes.gather_rail, bytes.gather_intra, bytes.reduce_rail, bytes.reduce_intra,
          bytes.replicate};
}

std::string describe(const World& world, const Case& run) {
  std::ostringstream text;
  text << world.num_nodes << " nodes x " << world.ranks_per_node << ", p=" << world.partition_size
       << (world.hierarchical ? " hierarchical" : " flat") << ", s=" << run.num_microsteps
       << ", residency " << static_cast<int>(run.residency.after_forward)
       << static_cast<int>(run.residency.between_microsteps)
       << static_cast<int>(run.residency.gradient_accumulation);
  return text.str();
}

// Runs every case, one after the other, on one model per rank.
void expect_bytes(const World& world) {
  const std::vector<Case> cases = all_cases();
  struct Found {
    Bytes received, sent, predicted;
  };
  std::vector<std::vector<Found>> found(static_cast<size_t>(world.size()));
  LocalWorld local(world.size(), std::chrono::seconds(60));
  run_ranks(world.size(), [&](int rank) {
    Model model(local, world, rank);
    for (const Case& run : cases) {
      const Bytes received_before = received(model);
      const Bytes sent_before = sent(model);
      run_step(model, rank, run);
      Bytes total{};
      for (int layer = 0; layer < kNumLayers; ++layer) {
        const Bytes of_unit = predicted(world, model.unit(layer), run);
        for (size_t i = 0; i < total.size(); ++i) total[i] += of_unit[i];
      }
      found[static_cast<size_t>(rank)].push_back(
          {received(model) - received_before, sent(model) - sent_before, total});
    }
  });
  for (size_t rank = 0; rank < found.size(); ++rank) {
    for (size_t i = 0; i < cases.size(); ++i) {
      for (size_t name = 0; name < std::size(kNames); ++name) {
        const Found& one = found[rank][i];
        ASSERT_EQ(one.received[name], one.predicted[name])
            << kNames[name] << ", rank " << rank << " of " << describe(world, cases[i]);
        ASSERT_EQ(one.sent[name], one.predicted[name])
            << kNames[name] << ", rank " << rank << " of " << describe(world, cases[i]);
      }
    }
  }
}

class CountedBytes : public ::testing::TestWithParam<int> {};

TEST_P(CountedBytes, AreThoseOfTheCostModel) {
  const int n = GetParam();
  for (int ranks_per_node = 1; ranks_per_node <= n; ++ranks_per_node) {
    if (n % ranks_per_node != 0) continue;
    for (const int p : Topology::legal_partition_sizes(n, ranks_per_node)) {
      expect_bytes({n / ranks_per_node, ranks_per_node, p, false});
      if (p > ranks_per_node) expect_bytes({n / ranks_per_node, ranks_per_node, p, true});
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(WorldsOf, CountedBytes, ::testing::Range(1, 9));

}  // namespace
}  // namespace mics
