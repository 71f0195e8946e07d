// UseOrder: in which order units are needed in one phase, recorded once and replayed.
//
// A phase is a forward or a backward. The first time, its uses are written down; from then on
// upcoming() says what comes next, so that gathers can be started ahead. Uses are noted at the same
// places on every rank, so every rank starts the same gathers in the same order.
//
//   begin()  note(0) note(1) note(2)  end()      records 0 1 2
//   begin()  note(0): upcoming(2) is 1 2
//            note(2): differs; the record is now 0 2 and grows as the phase goes on
//
// Not thread-safe: one thread at a time.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace mics {

class UseOrder {
 public:
  // Starts a phase.
  void begin() { position_ = 0; }
  // `unit` is needed now. False when another unit was expected: what is recorded from here on is
  // forgotten and written anew.
  bool note(int unit);
  // Ends the phase. False when more was expected; the record is cut to what happened.
  bool end();

  // The next units of the record, at most `depth`, soonest first.
  [[nodiscard]] std::span<const int> upcoming(int depth) const;
  // The first units of the record, at most `depth`.
  [[nodiscard]] std::span<const int> first(int depth) const;

 private:
  std::vector<int> recorded_;
  size_t position_ = 0;  // of the next use
};

}  // namespace mics
