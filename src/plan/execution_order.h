// ExecutionOrder: the order in which units were used, phase by phase, and which phase follows which.
//
// A phase is a forward or a backward, known by its kind and the first unit that it uses. Its uses
// are recorded the first time; from then on upcoming() gives the next ones, and following() those
// that the phase after it begins with, so that units can be prefetched. All answers follow from the
// sequence of calls alone: ranks that make the same calls get the same answers.
//
//   begin(kForward, ...)  use(0) use(1) use(2)  end_uses() end()    records 0 1 2
//   begin(kForward, ...)  use(0)                                    upcoming(2) is 1 2
//                         use(2)                                    another order: 0 2 is recorded
//
// Thread safety: one thread at a time.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "mics/prefetch.h"

namespace mics {

// The uses of one phase.
class PhaseRecord {
 public:
  void begin() { position_ = 0; }
  // `unit` is used now. False when another unit was expected: the record is cut here and goes on
  // with `unit`.
  bool use(int unit);
  // False when more uses were expected: the record is cut to what happened.
  bool end();

  // The next units, at most `depth`, soonest first.
  [[nodiscard]] std::span<const int> upcoming(int depth) const;
  // The first units, at most `depth`.
  [[nodiscard]] std::span<const int> first(int depth) const;

 private:
  std::vector<int> units_;
  size_t position_ = 0;  // of the next use
};

class ExecutionOrder {
 public:
  explicit ExecutionOrder(int num_units);

  // Opens a phase. `looks_past`: units of the phase that follows may be prefetched before its end.
  void begin(Phase kind, bool looks_past);
  // `unit` is used now. False when another unit or phase was expected: what was prefetched for it
  // may not be used. True outside of a phase.
  bool use(int unit);
  // The open phase uses no more units. False when more were expected.
  bool end_uses();
  void end();

  [[nodiscard]] bool is_open(Phase kind) const { return kind_ == kind; }
  [[nodiscard]] bool looks_past() const { return looks_past_; }
  // The next uses of the open phase, at most `depth`, soonest first. Empty before its first use.
  [[nodiscard]] std::span<const int> upcoming(int depth) const;
  // The first uses of the phase that followed the open one the last time. Empty where none is
  // recorded, or where the open phase does not look past its end.
  [[nodiscard]] std::span<const int> following(int depth) const;
  // A forward followed the open phase the last time.
  [[nodiscard]] bool is_forward_next() const;

  // Times that a phase used units in another order than recorded.
  [[nodiscard]] int64_t num_changes() const { return num_changes_; }
  // Forgets all records, and an open phase.
  void forget();

 private:
  struct RecordedPhase {
    PhaseRecord record;
    RecordedPhase* next = nullptr;  // the one that followed the last time
  };

  // The first use of the open phase. False when another phase was expected.
  bool enter_phase(int first_unit);

  std::array<std::vector<RecordedPhase>, 2> phases_;  // by kind and first unit
  std::optional<Phase> kind_;                         // of the open phase
  RecordedPhase* phase_ = nullptr;                    // the open one, from its first use on
  RecordedPhase* last_phase_ = nullptr;  // the one before it, where that looked past its end
  bool looks_past_ = false;
  int64_t num_changes_ = 0;
};

}  // namespace mics
