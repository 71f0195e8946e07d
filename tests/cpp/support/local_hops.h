// The communicators of one partition group of N nodes x L ranks on the local backend, for one rank.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "mics/local_world.h"
#include "mics/unit_collectives.h"

namespace mics::testing {

using MakeCommunicator = std::function<std::unique_ptr<Communicator>(GroupInfo)>;

inline MakeCommunicator communicators_of(LocalWorld& world) {
  return [&world](GroupInfo group) { return world.make_communicator(std::move(group)); };
}

// Ranks of node m are m * L .. m * L + L - 1. `hierarchical`: rail and intra, else one group of N *
// L.
class LocalHops {
 public:
  LocalHops(LocalWorld& world, int num_nodes, int ranks_per_node, bool hierarchical, int rank,
            const std::string& direction)
      : LocalHops(communicators_of(world), num_nodes, ranks_per_node, hierarchical, rank,
                  direction) {}
  LocalHops(const MakeCommunicator& make, int num_nodes, int ranks_per_node, bool hierarchical,
            int rank, const std::string& direction) {
    const int node = rank / ranks_per_node;
    const int local = rank % ranks_per_node;
    GroupInfo intra{direction + "/intra", {}, {}, hierarchical ? local : rank};
    GroupInfo rail{direction + "/rail", {}, {}, node};
    for (int m = 0; m < num_nodes; ++m) {
      rail.world_ranks.push_back(m * ranks_per_node + local);
      rail.nodes.push_back(m);
      for (int l = 0; l < ranks_per_node; ++l) {
        if (hierarchical && m != node) continue;
        intra.world_ranks.push_back(m * ranks_per_node + l);
        intra.nodes.push_back(m);
      }
    }
    intra_ = make(intra);
    if (hierarchical && num_nodes > 1) rail_ = make(rail);
  }

  [[nodiscard]] HopCommunicators hops() const { return {rail_.get(), intra_.get()}; }
  [[nodiscard]] const Traffic& intra() const { return intra_->traffic(); }
  [[nodiscard]] Traffic rail() const { return rail_ ? rail_->traffic() : Traffic{}; }

 private:
  std::unique_ptr<Communicator> intra_;
  std::unique_ptr<Communicator> rail_;
};

}  // namespace mics::testing
