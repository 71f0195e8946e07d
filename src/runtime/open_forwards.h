// OpenForwards: the forwards of a root module that have begun and not returned.
//
// Thread safety: one thread at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "plan/schedule.h"

namespace mics {

class Engine;

// One forward of a unit.
struct OpenCall {
  int64_t call = -1;  // on the tape; -1: autograd does not record
  std::shared_ptr<Tape> tape;
  bool is_watched = false;
  bool is_opaque = false;         // no output was found
  bool is_recomputation = false;  // inside a backward
};

// Where hooks on a graph lead: to the engine that recorded it, or to one that has adopted that.
struct Route {
  std::weak_ptr<Engine> engine;
  std::vector<int> units;  // there, of those here
};

class OpenForwards {
 public:
  explicit OpenForwards(size_t num_units) : calls_(num_units), opaque_(num_units) {}

  // The open calls of `unit`, innermost last.
  [[nodiscard]] std::vector<OpenCall>& calls(int unit) { return calls_[static_cast<size_t>(unit)]; }
  // The last call of `unit` of which no output was found, since the outermost forward began.
  [[nodiscard]] std::optional<OpenCall>& opaque(int unit) {
    return opaque_[static_cast<size_t>(unit)];
  }
  void begin_outermost(int unit) {
    std::fill(opaque_.begin(), opaque_.end(), std::nullopt);
    outermost = unit;
  }
  [[nodiscard]] bool is_lent(int unit) const {
    return std::find(lent.begin(), lent.end(), unit) != lent.end();
  }

  int depth = 0;                             // open forwards outside backward
  int outermost = -1;                        // unit of the outermost one
  std::vector<int> lent;                     // until the outermost one returns
  std::shared_ptr<Tape> tape;                // of the outermost one
  std::shared_ptr<Tape> recomputation_tape;  // of a backward that began with a recomputation

 private:
  std::vector<std::vector<OpenCall>> calls_;
  std::vector<std::optional<OpenCall>> opaque_;
};

}  // namespace mics
