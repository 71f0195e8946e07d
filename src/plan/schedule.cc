#include "plan/schedule.h"

#include <algorithm>

#include "plan/check.h"

namespace mics {

Schedule::Schedule(int num_units) : num_units_(num_units) {
  MICS_CHECK(num_units >= 1, "a schedule needs at least one unit: got num_units=", num_units, ".");
}

std::shared_ptr<Tape> Schedule::new_tape() {
  std::erase_if(tapes_, [](const std::weak_ptr<Tape>& tape) { return tape.expired(); });
  auto tape = std::make_shared<Tape>();
  tapes_.push_back(tape);
  return tape;
}

int64_t Schedule::begin_call(Tape& tape, int unit) {
  MICS_INTERNAL_CHECK(unit >= 0 && unit < num_units_, "unit ", unit, " of ", num_units_, ".");
  const int64_t call = next_call_++;
  tape.events_.push_back({Tape::EventKind::kBegin, call, unit, false, /*is_open=*/true});
  return call;
}

int64_t Schedule::begin_lent_call(Tape& tape, int unit) {
  const int64_t call = begin_call(tape, unit);
  // Moves the begin right behind the outermost one, which is first on the tape.
  std::rotate(tape.events_.begin() + (tape.events_.size() > 1 ? 1 : 0), tape.events_.end() - 1,
              tape.events_.end());
  return call;
}

int64_t Schedule::begin_recomputed_call(Tape& tape, int unit, int64_t graph_task,
                                        std::vector<Action>& actions) {
  std::vector<Tape::Event>& events = tape.events_;
  while (!events.empty() && events.back().graph_task > graph_task) {
    const int64_t finished = events.back().call;
    while (events.back().kind != Tape::EventKind::kBegin || events.back().call != finished) {
      pass_last(tape, actions);
    }
    pass_last(tape, actions);
  }
  const int64_t call = begin_call(tape, unit);
  events.back().is_recomputed = true;
  return call;
}

void Schedule::end_call(Tape& tape, int64_t call, int unit) {
  const auto begin = std::find_if(tape.events_.rbegin(), tape.events_.rend(),
                                  [call](const Tape::Event& event) { return event.call == call; });
  MICS_INTERNAL_CHECK(begin != tape.events_.rend(), "call ", call, " ends but never began.");
  begin->is_open = false;
  tape.events_.push_back({Tape::EventKind::kEnd, call, unit, begin->is_recomputed});
}

void Schedule::cancel_call(Tape& tape, int64_t call) {
  std::erase_if(tape.events_, [call](const Tape::Event& event) { return event.call == call; });
}

bool Schedule::has_earlier_call(int unit) const {
  for (const std::weak_ptr<Tape>& weak : tapes_) {
    const std::shared_ptr<Tape> tape = weak.lock();
    if (!tape) continue;
    for (const Tape::Event& event : tape->events_) {
      if (event.kind == Tape::EventKind::kBegin && event.unit == unit) return true;
    }
  }
  return false;
}

// Takes the last event from `tape` as backward passes it, and adds the actions that follow.
void Schedule::pass_last(Tape& tape, std::vector<Action>& actions) {
  const Tape::Event event = tape.events_.back();
  tape.events_.pop_back();
  if (event.is_open && !event.is_recomputed) return tape.open_.push_back(event);
  const bool is_unused_recomputation = event.is_recomputed && !event.is_entered();
  switch (event.kind) {
    case Tape::EventKind::kEnd:
      if (!event.is_entered() && !is_unused_recomputation) {
        // No gradient reached this call here, but other ranks may run its backward: join it.
        actions.push_back({ActionKind::kGather, event.unit});
        unreduced_.insert(event.unit);
      }
      return;
    case Tape::EventKind::kBegin: {
      const bool has_earlier = has_earlier_call(event.unit);
      // The backward of the forward that it repeats is still to come, or running.
      if (is_unused_recomputation && has_earlier) return;
      // Gradients of a unit add up over its calls until its earliest call has been passed.
      if (!has_earlier && unreduced_.erase(event.unit) > 0) {
        actions.push_back({ActionKind::kReduce, event.unit});
      }
      actions.push_back({ActionKind::kReshard, event.unit});
      return;
    }
  }
}

std::vector<Action> Schedule::enter_backward(const std::shared_ptr<Tape>& tape, int64_t call,
                                             int unit, int64_t graph_task) {
  std::vector<Action> actions;
  backward_tape_ = tape;
  if (std::find(touched_tapes_.begin(), touched_tapes_.end(), tape) == touched_tapes_.end()) {
    touched_tapes_.push_back(tape);
  }
  std::vector<Tape::Event>& events = tape->events_;
  const auto end = std::find_if(events.rbegin(), events.rend(), [call](const Tape::Event& event) {
    return event.call == call && event.kind == Tape::EventKind::kEnd;
  });
  // A call that was entered or passed before needs its parameters, and nothing else.
  const bool is_first = end != events.rend() && !end->is_entered();
  if (is_first) {
    while (events.back().call != call) pass_last(*tape, actions);
    for (Tape::Event& event : events) {
      if (event.call == call) event.graph_task = graph_task;
    }
  }
  actions.push_back({is_first ? ActionKind::kGather : ActionKind::kGatherAgain, unit});
  unreduced_.insert(unit);
  return actions;
}

std::vector<Action> Schedule::finish_backward() {
  std::vector<Action> actions;
  std::set<int> open;
  for (const std::shared_ptr<Tape>& tape : touched_tapes_) {
    while (!tape->events_.empty()) pass_last(*tape, actions);
    for (const Tape::Event& event : tape->open_) open.insert(event.unit);
    // Calls that are open go back on the tape: their forward goes on.
    tape->events_.assign(tape->open_.rbegin(), tape->open_.rend());
    tape->open_.clear();
  }
  unreduced_.insert(open.begin(), open.end());
  // Units that are left had a backward after their call was passed, or have calls that are open or
  // on a tape that this backward did not touch.
  for (auto unit = unreduced_.rbegin(); unit != unreduced_.rend(); ++unit) {
    actions.push_back({ActionKind::kReduce, *unit});
    if (!open.contains(*unit)) actions.push_back({ActionKind::kReshard, *unit});
  }
  unreduced_.clear();
  touched_tapes_.clear();
  backward_tape_ = nullptr;
  return actions;
}

void Schedule::adopt(Schedule& older, const std::vector<int>& units) {
  for (const std::weak_ptr<Tape>& weak : older.tapes_) {
    const std::shared_ptr<Tape> tape = weak.lock();
    if (!tape) continue;
    for (Tape::Event& event : tape->events_) event.unit = units[static_cast<size_t>(event.unit)];
    tapes_.push_back(weak);
  }
  // Call numbers must stay unique on a tape.
  next_call_ = std::max(next_call_, older.next_call_);
  older.reset();
}

void Schedule::reset() {
  tapes_.clear();
  touched_tapes_.clear();
  backward_tape_ = nullptr;
  unreduced_.clear();
}

}  // namespace mics
