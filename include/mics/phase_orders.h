// PhaseOrders: the recorded order of use of every phase, and which phase follows which.
//
// A phase is a forward or a backward, known by its kind and the first unit that it uses. What was
// recorded says which units are needed next, into the phase that followed the last time too, so
// that gathers can be started ahead. Decided by the sequence of calls alone: ranks that make the
// same calls get the same answers.
//
//   begin(kForward, true)   use(0) use(1) use(2)   end_uses()   end()
//   begin(kBackward, ...)   use(2) ...
//
// Thread safety: one thread at a time.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "mics/use_order.h"

namespace mics {

class PhaseOrders {
 public:
  enum class Kind { kForward, kBackward };

  explicit PhaseOrders(int num_units);

  // Opens a phase. `looks_past`: what follows it may be started before its end.
  void begin(Kind kind, bool looks_past);
  // `unit` is needed now. False when something else was expected, which may have been started.
  // Outside of a phase: nothing.
  bool use(int unit);
  // The open phase uses no more units. False when more was expected.
  bool end_uses();
  void end();

  [[nodiscard]] bool is_open(Kind kind) const { return kind_ == kind; }
  [[nodiscard]] bool looks_past() const { return looks_past_; }
  // The next uses of the open phase, at most `depth`, soonest first. Empty before its first use.
  [[nodiscard]] std::span<const int> upcoming(int depth) const;
  // The first uses of the phase that followed the open one the last time; empty where nothing is
  // known, or where the open phase was not to look past its end.
  [[nodiscard]] std::span<const int> following(int depth) const;

  // What following() gives is a forward's.
  [[nodiscard]] bool is_forward_next() const;

  // Times that a phase used units in another order than recorded.
  [[nodiscard]] int64_t num_changes() const { return num_changes_; }
  // Forgets what is recorded, and an open phase.
  void forget();

 private:
  struct Phase {
    UseOrder order;
    Phase* next = nullptr;  // the one that followed the last time
  };

  // The first use of the open phase. False when another phase was expected.
  bool note_phase(int first_unit);

  std::array<std::vector<Phase>, 2> phases_;  // by kind and first unit
  std::optional<Kind> kind_;                  // of the open phase
  Phase* phase_ = nullptr;                    // the open one, from its first use on
  Phase* last_phase_ = nullptr;               // the one before it, where that looked past its end
  bool looks_past_ = false;
  int64_t num_changes_ = 0;
};

}  // namespace mics
