// Schedule: in which order units are gathered, resharded and reduced. A pure state machine.
//
// A forward that autograd recorded is written on a *tape*: kBegin when a unit's forward starts,
// kEnd when it returns. Backward walks the tape from its end. Passing the kEnd of a call gathers
// the unit; passing its kBegin means that all its gradients are there: the unit is reduced and
// resharded.
//
//   forward    Begin(root) Begin(b0) End(b0) Begin(b1) End(b1) End(root)
//   backward <-------------------------------------------------------
//              reduce root            reduce b1, then gather b0      gather root, gather b1
//
// Why the tape and not the arrival of gradients decides: the launch points are then the same on
// every rank, also when a parameter, or a whole unit, gets no gradient on some ranks. A unit whose
// backward never ran on this rank is passed like the others, so this rank joins the collectives
// that the other ranks run for it. Autograd runs nodes in descending order of creation, so no
// gradient comes late on one device; one that does is reduced again in finish_backward().
//
// A backward inside a forward: open calls are not passed. Gradients that their units have by the end
// of the backward are reduced, and the units stay gathered until their forwards return.
//
// A lent unit is used by other modules than its own, so its last use in forward and its first in
// backward are not known: its call lasts as long as that of the outermost unit.
//
// Recomputation (activation checkpointing) writes new calls on the tape at the place where backward
// stands. Either their backward runs (re-entrant) and they are passed like any call, or it never
// does (the graph of the first forward is used) and they are passed without effect.
//
// Not thread-safe: one thread at a time.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <vector>

namespace mics {

enum class ActionKind {
  kGather,       // make the unit's full parameters available; nothing if they are
  kGatherAgain,  // the same, for a gradient that comes late: maybe on this rank alone
  kReduce,       // reduce the unit's gradients inside the partition group
  kReshard,      // free the unit's full parameters
};

struct Action {
  ActionKind kind;
  int unit;
  friend bool operator==(const Action&, const Action&) = default;
};

// One root forward. Shared with the hooks on its outputs: a tape that nothing but the Schedule
// refers to belongs to a graph that is gone, and is forgotten.
class Tape {
 private:
  friend class Schedule;
  enum class EventKind { kBegin, kEnd };
  struct Event {
    EventKind kind;
    int64_t call;
    int unit;
    bool is_recomputed = false;
    bool is_open = false;     // kBegin: the forward has not returned
    int64_t graph_task = -1;  // in which backward of this call started; -1: it has not
    [[nodiscard]] bool is_entered() const { return graph_task >= 0; }
  };
  std::vector<Event> events_;
  std::vector<Event> open_;  // kBegin of forwards in which this backward runs, the last first
};

class Schedule {
 public:
  explicit Schedule(int num_units);

  // A new, empty tape.
  [[nodiscard]] std::shared_ptr<Tape> new_tape();

  // Writes the start of a forward of `unit`. Returns the number of the call, unique in this
  // Schedule.
  [[nodiscard]] int64_t begin_call(Tape& tape, int unit);
  // Writes a call of `unit` that has begun with the outermost one on the tape.
  [[nodiscard]] int64_t begin_lent_call(Tape& tape, int unit);
  // `unit` was used inside backward by other modules than its own: it is reduced at the end of that
  // backward at the latest.
  void note_late_use(int unit) { unreduced_.insert(unit); }
  // As begin_call() for a forward inside backward, in graph task `graph_task`. Appends to `actions`
  // what to do before it: calls whose own, nested backward is over are passed. Graph tasks are
  // numbered in the order of their start, so a call that a later task entered belongs to a nested
  // backward that has ended.
  [[nodiscard]] int64_t begin_recomputed_call(Tape& tape, int unit, int64_t graph_task,
                                              std::vector<Action>& actions);
  // Writes the end of a call.
  void end_call(Tape& tape, int64_t call, int unit);
  // Removes a call: its forward failed or has no output that requires a gradient.
  void cancel_call(Tape& tape, int64_t call);

  // Backward reached the outputs of `call` in graph task `graph_task`. Returns what to do before
  // the call's backward may run. Call it for each output; only the first changes anything.
  [[nodiscard]] std::vector<Action> enter_backward(const std::shared_ptr<Tape>& tape, int64_t call,
                                                   int unit, int64_t graph_task);
  // The outermost backward is over. Passes what is left on the tapes that it touched and reduces
  // what has not been reduced.
  [[nodiscard]] std::vector<Action> finish_backward();

  // The tape on which backward stands; null outside backward.
  [[nodiscard]] const std::shared_ptr<Tape>& backward_tape() const { return backward_tape_; }

  // Takes over the tapes of `older`, whose unit i is `units[i]` here.
  void adopt(Schedule& older, const std::vector<int>& units);

  // Forgets all tapes and calls, after an exception.
  void reset();

 private:
  void pass_last(Tape& tape, std::vector<Action>& actions);
  [[nodiscard]] bool has_earlier_call(int unit) const;

  int num_units_;
  int64_t next_call_ = 0;
  std::vector<std::weak_ptr<Tape>> tapes_;
  // Of the current backward.
  std::shared_ptr<Tape> backward_tape_;
  std::vector<std::shared_ptr<Tape>> touched_tapes_;
  std::set<int> unreduced_;  // gathered in this backward and not reduced since
};

}  // namespace mics
