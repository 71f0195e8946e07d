#include "mics/model/planner.h"

#include <algorithm>
#include <limits>
#include <map>
#include <utility>

#include "plan/check.h"

namespace mics {
namespace {

struct Prefetch {
  int rail;
  int intra;
};
constexpr Prefetch kPrefetches[] = {{1, 1}, {2, 1}, {4, 2}};
constexpr Residency kResidencies[] = {Residency::kShard, Residency::kBlock, Residency::kFull};

struct Option {
  StepSettings settings;
  MemoryTerms memory;
  double bound = 0;
};

class Search {
 public:
  explicit Search(const PlanRequest& request) : request_(request) {
    MICS_CHECK(
        request.world_size >= 1 && request.global_batch >= 1 && request.num_ranked >= 1,
        "a plan needs ranks, samples and room for a result: got world_size=", request.world_size,
        ", global_batch=", request.global_batch, ", num_ranked=", request.num_ranked, ".");
  }

  PlanResult run() {
    const std::vector<int> batches = micro_batches();
    for (const int p : partition_sizes()) {
      const bool spans_nodes = p > request_.cluster.machine.ranks_per_node;
      for (const Variant variant : variants(spans_nodes)) {
        const bool has_blocks = spans_nodes && variant == Variant::kHierarchical;
        for (const bool recompute : recomputations()) {
          for (const int batch : batches) try_all(p, variant, recompute, batch, has_blocks);
        }
      }
    }
    simulate();
    return std::move(result_);
  }

 private:
  using Kind = std::pair<int, Variant>;

  std::vector<int> partition_sizes() const {
    const int per_node = std::min(request_.world_size, request_.cluster.machine.ranks_per_node);
    std::vector<int> legal = Topology::legal_partition_sizes(request_.world_size, per_node);
    if (request_.partition_sizes.empty()) return legal;
    for (const int p : request_.partition_sizes) {
      MICS_CHECK(std::find(legal.begin(), legal.end(), p) != legal.end(),
                 "partition_size must be legal for the cluster: got partition_size=", p,
                 ", world_size=", request_.world_size, ", ranks_per_node=", per_node, ". Use ",
                 join_or(legal), ".");
    }
    return request_.partition_sizes;
  }

  // Sizes to try: the divisors of the samples of one rank.
  std::vector<int> micro_batches() const {
    const int64_t n = request_.world_size;
    std::vector<int> batches;
    const int64_t samples = request_.global_batch / n;
    const int64_t most = std::min<int64_t>(samples, std::numeric_limits<int>::max());
    const bool is_whole = request_.global_batch % n == 0;
    if (request_.micro_batches.empty()) {
      for (int64_t b = 1; is_whole && b <= most; b *= 2) {
        if (samples % b == 0) batches.push_back(static_cast<int>(b));
      }
    }
    for (const int b : request_.micro_batches) {
      if (is_whole && b >= 1 && samples % b == 0) batches.push_back(b);
    }
    MICS_CHECK(!batches.empty(),
               "the global batch must be micro-batches on every rank: got global_batch=",
               request_.global_batch, ", world_size=", n,
               ". Use a multiple of world_size, and a micro-batch that divides their quotient.");
    return batches;
  }

  std::vector<Variant> variants(bool spans_nodes) const {
    if (!spans_nodes) return {Variant::kFlat};
    if (!request_.variants.empty()) return request_.variants;
    return {Variant::kHierarchical, Variant::kFlat};
  }

  std::vector<bool> recomputations() const {
    if (!request_.recompute.empty()) return request_.recompute;
    return {false, true};
  }

  // Residencies that differ in effect for a group of this kind.
  std::vector<ResidencySettings> residencies(int p, int num_microsteps, bool has_blocks) const {
    if (!request_.vary_residency) return {request_.base.residency};
    std::vector<ResidencySettings> all;
    const auto exists = [&](Residency r) { return r != Residency::kBlock || has_blocks; };
    for (const Residency gradient : kResidencies) {
      for (const Residency between : kResidencies) {
        for (const Residency forward : kResidencies) {
          if (!exists(gradient) || !exists(between) || !exists(forward)) continue;
          // What is kept between micro-steps is kept after forward too.
          if (forward < between) continue;
          const bool keeps = between != Residency::kShard || gradient != Residency::kShard;
          if (num_microsteps == 1 && keeps) continue;
          if (p == 1 && (keeps || forward != Residency::kShard)) continue;
          all.push_back({forward, between, gradient});
        }
      }
    }
    return all;
  }

  void try_all(int p, Variant variant, bool recompute, int micro_batch, bool has_blocks) {
    StepSettings settings = request_.base;
    settings.world_size = request_.world_size;
    settings.partition_size = p;
    settings.gather = settings.reduce = variant;
    settings.recompute = recompute;
    settings.micro_batch = micro_batch;
    const int64_t samples = int64_t{micro_batch} * request_.world_size;
    settings.num_microsteps = static_cast<int>(request_.global_batch / samples);
    for (const ResidencySettings& residency : residencies(p, settings.num_microsteps, has_blocks)) {
      settings.residency = residency;
      if (!request_.vary_prefetch || p == 1) {
        consider(settings);
        continue;
      }
      for (const Prefetch& prefetch : kPrefetches) {
        settings.prefetch_rail = prefetch.rail;
        settings.prefetch_intra = prefetch.intra;
        consider(settings);
      }
    }
  }

  void consider(const StepSettings& settings) {
    ++result_.num_considered;
    const MemoryTerms memory =
        step_memory(request_.workload, request_.cluster, settings, request_.limits);
    if (!fits(memory, request_.limits)) {
      Candidate& nearest = misses_.try_emplace(settings.partition_size).first->second;
      if (nearest.memory.peak == 0 || memory.peak < nearest.memory.peak) {
        nearest = {settings, {}, memory};
      }
      return;
    }
    ++result_.num_fitting;
    const double bound = step_time_bound(request_.workload, request_.cluster, settings);
    options_.push_back({settings, memory, bound});
  }

  // Simulates in the order of bounds, and skips an option whose bound is no better than the leader
  // of its kind and the last of the ranking: it can replace neither.
  void simulate() {
    std::stable_sort(options_.begin(), options_.end(),
                     [](const Option& a, const Option& b) { return a.bound < b.bound; });
    std::map<Kind, Candidate> best;
    const auto is_faster = [](const Candidate& a, const Candidate& b) {
      return a.time.total < b.time.total;
    };
    std::vector<Candidate>& ranked = result_.ranked;
    const size_t num_ranked = static_cast<size_t>(request_.num_ranked);
    for (const Option& option : options_) {
      const Kind kind{option.settings.partition_size, option.settings.gather};
      const auto known = best.find(kind);
      const bool may_rank = ranked.size() < num_ranked || option.bound < ranked.back().time.total;
      const bool may_lead = known == best.end() || option.bound < known->second.time.total;
      if (!may_rank && !may_lead) continue;
      ++result_.num_simulated;
      const Candidate candidate{option.settings,
                                step_time(request_.workload, request_.cluster, option.settings),
                                option.memory};
      if (known == best.end()) {
        best.emplace(kind, candidate);
      } else if (is_faster(candidate, known->second)) {
        known->second = candidate;
      }
      ranked.insert(std::upper_bound(ranked.begin(), ranked.end(), candidate, is_faster),
                    candidate);
      if (ranked.size() > num_ranked) ranked.pop_back();
    }
    for (const auto& [kind, leader] : best) {
      result_.leaders.push_back(leader);
      misses_.erase(kind.first);
    }
    for (const auto& [p, candidate] : misses_) result_.misses.push_back(candidate);
  }

  const PlanRequest& request_;
  std::vector<Option> options_;
  std::map<int, Candidate> misses_;
  PlanResult result_;
};

}  // namespace

PlanResult plan_step(const PlanRequest& request) { return Search(request).run(); }

}  // namespace mics
