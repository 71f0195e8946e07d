// Training through the production NCCL code over fakes: engine, units, pipelines, communicators and
// streams are those of a CUDA rank.
#include "support/nccl_training.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

namespace mics {
namespace {

using testing::Case;
using testing::expect_bitwise_equal;
using testing::FakeCuda;
using testing::kMicroSteps;
using testing::kNumLayers;
using testing::NcclRanks;
using testing::Rank;
using testing::run_ranks;
using testing::train;
using testing::train_locally;
using testing::train_over_nccl;

// --- the budget of docs/streams.md ---------------------------------------------------------------

struct Calls {
  int launches = 0;
  int records = 0;
  int waits = 0;
  bool operator==(const Calls&) const = default;
};
Calls operator*(int times, const Calls& calls) {
  return {times * calls.launches, times * calls.records, times * calls.waits};
}
Calls operator+(const Calls& a, const Calls& b) {
  return {a.launches + b.launches, a.records + b.records, a.waits + b.waits};
}
void PrintTo(const Calls& calls, std::ostream* out) {
  *out << calls.launches << " launches, " << calls.records << " records, " << calls.waits
       << " waits";
}

// The row of the page's table, "| use | launches | records | waits |".
Calls budget(const std::string& use) {
  std::ifstream page(MICS_DOCS_DIR "/streams.md");
  for (std::string line; std::getline(page, line);) {
    const std::string start = "| " + use + " |";
    if (line.compare(0, start.size(), start) != 0) continue;
    std::istringstream numbers(line.substr(start.size()));
    Calls calls;
    char bar = 0;
    numbers >> calls.launches >> bar >> calls.records >> bar >> calls.waits;
    return calls;
  }
  ADD_FAILURE() << "docs/streams.md has no row \"" << use << "\"";
  return {};
}

struct Step {
  Calls calls;
  std::map<std::string, int> others;  // calls by name
};

// Of rank 0, in its fourth step.
Step count_step(const Case& what, int max_in_flight = 0) {
  std::map<std::string, int> counts;
  NcclRanks ranks(what.world.size());
  run_ranks(what.world.size(), [&](int rank) {
    ranks.options(rank).max_in_flight = max_in_flight;
    Rank one(ranks, what, rank);
    train(one.model(), rank, 3);
    if (rank == 0) {
      (void)ranks.cuda(0).take_counts();
      (void)ranks.nccl(0).take_counts();
    }
    train(one.model(), rank, 1);
    if (rank != 0) return;
    counts = ranks.cuda(0).take_counts();
    counts.merge(ranks.nccl(0).take_counts());
  });
  const auto take = [&](const char* name) {
    const auto found = counts.extract(name);
    return found.empty() ? 0 : found.mapped();
  };
  Step step;
  step.calls = {take("launch"), take("event_record"), take("stream_wait_event")};
  step.others = counts;
  return step;
}

constexpr Residency kShard = Residency::kShard;
constexpr Residency kBlock = Residency::kBlock;
constexpr Residency kFull = Residency::kFull;

constexpr int kUses = kNumLayers * kMicroSteps;  // of units, in the forwards of a step

// What every step has beside gathers and reductions of its units.
Calls ends(int num_in_flight) {
  return kNumLayers * budget("end of a unit's step") +
         kMicroSteps * num_in_flight * Calls{0, 0, budget("end of a backward").waits / 2} +
         budget("end of a step");
}

TEST(NcclBudget, OneNode) {
  const Step step = count_step({"", {1, 4, 4, false}, {}});
  EXPECT_EQ(step.calls,
            2 * kUses * budget("gather, one hop") + kUses * budget("reduce, one hop") + ends(2));
}

TEST(NcclBudget, TwoNodesHierarchical) {
  const Step step = count_step({"", {2, 2, 4, true}, {}});
  EXPECT_EQ(step.calls,
            2 * kUses * budget("gather, two hops") + kUses * budget("reduce, two hops") + ends(2));
  // One NCCL group for the two pieces of a unit's hop inside a node; hop 1 is one call.
  EXPECT_EQ(step.others.at("group_start"), 3 * kUses);
  EXPECT_EQ(step.others.at("all_gather"), 2 * kUses * 3);
  EXPECT_EQ(step.others.at("reduce_scatter"), kUses * 3);
}

TEST(NcclBudget, Replicas) {
  const Step step = count_step({"", {2, 2, 2, false}, {}});
  EXPECT_EQ(step.calls, 2 * kUses * budget("gather, one hop") + kUses * budget("reduce, one hop") +
                            kNumLayers * budget("replicas' sum, per step") + ends(2));
}

TEST(NcclBudget, KeptBlocks) {
  const Step step = count_step({"", {2, 2, 4, true}, {kBlock, kBlock, kBlock}});
  EXPECT_EQ(step.calls, kNumLayers * budget("first gather into a kept node block") +
                            (2 * kUses - kNumLayers) * budget("gather, from a kept node block") +
                            kUses * budget("reduce, into a kept gradient block") +
                            kNumLayers * budget("hop 2 of a kept gradient block, per step") +
                            ends(2));
}

TEST(NcclBudget, NothingIsMadeAndTheHostWaitsForNothing) {
  for (const Case& what :
       {Case{"", {1, 4, 4, false}, {}}, Case{"", {2, 2, 4, true}, {}},
        Case{"", {2, 2, 2, false}, {}}, Case{"", {2, 2, 4, true}, {kFull, kFull, kShard}}}) {
    const Step step = count_step(what);
    for (const char* call : {"stream_query", "synchronisation", "pool_stream", "comm_split"}) {
      EXPECT_EQ(step.others.count(call), 0U) << call;
    }
    EXPECT_EQ(step.others.at("copy_from_host"), 1);  // the flags of the boundary
  }
}

// An edge per launch at most.
TEST(NcclBudget, LimitOfOperationsUnderWayAddsEdgesOnly) {
  const Case what{"", {2, 2, 4, true}, {}};
  const Step free = count_step(what);
  const Step limited = count_step(what, 1);
  EXPECT_EQ(limited.calls.launches, free.calls.launches);
  EXPECT_EQ(limited.calls.records, free.calls.records);
  EXPECT_GT(limited.calls.waits, free.calls.waits);
  EXPECT_LE(limited.calls.waits, free.calls.waits + free.calls.launches);
}

// Edges of rank 0 in a step, by the streams of record and wait.
std::map<FakeCuda::Edge, int> edges_of_step(const Case& what, int max_in_flight) {
  std::map<FakeCuda::Edge, int> edges;
  NcclRanks ranks(what.world.size());
  run_ranks(what.world.size(), [&](int rank) {
    ranks.options(rank).max_in_flight = max_in_flight;
    Rank one(ranks, what, rank);
    train(one.model(), rank, 1);
    (void)ranks.cuda(rank).take_edges();
    train(one.model(), rank, 1);
    if (rank == 0) edges = ranks.cuda(0).take_edges();
  });
  return edges;
}

// Streams as make_streams() makes them. A gather that waited for a reduction, or for the sum over
// replicas at a boundary, would hold up compute.
TEST(NcclBudget, LimitJoinsNoTwoDirections) {
  const std::vector<std::vector<int>> directions = {{0, 1}, {2, 3}, {4}};
  const auto direction_of = [&](int stream) {
    for (size_t i = 0; i < directions.size(); ++i) {
      for (const int other : directions[i]) {
        if (other == stream) return static_cast<int>(i);
      }
    }
    return -1;
  };
  for (const Case& what :
       {Case{"", {4, 2, 4, true}, {}}, Case{"", {2, 2, 2, false}, {}}}) {  // both with replicas
    const auto free = edges_of_step(what, 0);
    auto limited = edges_of_step(what, 1);
    int num_added = 0;
    for (const auto& [edge, count] : limited) {
      const auto found = free.find(edge);
      const int added = count - (found == free.end() ? 0 : found->second);
      if (direction_of(edge.first) == direction_of(edge.second)) {
        num_added += added;
      } else {
        EXPECT_EQ(added, 0) << "from stream " << edge.first << " to " << edge.second;
      }
    }
    if (what.world.hierarchical) {
      EXPECT_GT(num_added, 0);
    }
  }
}

// --- the bits ------------------------------------------------------------------------------------

class NcclTraining : public ::testing::TestWithParam<Case> {};

TEST_P(NcclTraining, GivesTheBitsOfTheLocalBackend) {
  const auto expected = train_locally(GetParam(), 2);
  NcclRanks ranks(GetParam().world.size());
  expect_bitwise_equal(train_over_nccl(ranks, GetParam(), 2), expected);
}

// Streams that run late, each in its own way: an edge that is missing shows as other bits.
TEST_P(NcclTraining, RandomDelaysChangeNothing) {
  const auto expected = train_locally(GetParam(), 2);
  for (unsigned seed = 1; seed <= 3; ++seed) {
    SCOPED_TRACE(seed);
    NcclRanks ranks(GetParam().world.size(), seed);
    expect_bitwise_equal(train_over_nccl(ranks, GetParam(), 2), expected);
  }
}

std::vector<Case> cases() {
  std::vector<Case> found;
  for (const int size : {1, 2, 4, 8}) {
    for (int local = 1; local <= size; local *= 2) {
      for (int p = 1; p <= size; p *= 2) {
        for (const bool hierarchical : {false, true}) {
          if (hierarchical && p <= local) continue;  // one node: there is nothing to choose
          found.push_back({std::to_string(size) + "ranks_" + std::to_string(local) + "local_p" +
                               std::to_string(p) + (hierarchical ? "_hierarchical" : ""),
                           {size / local, local, p, hierarchical},
                           {}});
        }
      }
    }
  }
  found.push_back({"blocks", {2, 2, 4, true}, {kBlock, kBlock, kBlock}});
  found.push_back({"full", {2, 2, 4, true}, {kFull, kFull, kShard}});
  return found;
}

INSTANTIATE_TEST_SUITE_P(Worlds, NcclTraining, ::testing::ValuesIn(cases()),
                         [](const ::testing::TestParamInfo<Case>& what) {
                           return what.param.name;
                         });

}  // namespace
}  // namespace mics
