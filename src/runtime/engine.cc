#include "mics/engine.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <utility>

#include "mics/check.h"
#include "mics/error.h"

namespace mics {

namespace {

bool is_inside_autograd() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace

std::shared_ptr<Engine> Engine::create(std::vector<std::shared_ptr<Unit>> units,
                                       Communicator* control, std::unique_ptr<Stream> stream) {
  return std::shared_ptr<Engine>(new Engine(std::move(units), control, std::move(stream)));
}

Engine::Engine(std::vector<std::shared_ptr<Unit>> units, Communicator* control,
               std::unique_ptr<Stream> stream)
    : units_(std::move(units)),
      control_(control),
      stream_(std::move(stream)),
      schedule_(static_cast<int>(units_.size())),
      backward_prefetch_(units_.size()),
      open_calls_(units_.size()) {}

void Engine::pre_forward(int unit) {
  OpenCall open;
  open.is_entered = std::make_shared<bool>(false);
  open.is_recomputation = is_inside_autograd();
  if (open.is_recomputation) {
    begin_backward();
    open.tape = schedule_.backward_tape() ? schedule_.backward_tape() : recomputation_tape_;
    if (!open.tape) open.tape = recomputation_tape_ = schedule_.new_tape();
    if (c10::GradMode::is_enabled()) {
      std::vector<Action> actions;
      open.call = schedule_.begin_recomputed_call(
          *open.tape, unit, torch::autograd::get_current_graph_task_id(), actions);
      run(actions);
    }
  } else {
    // A backward that threw leaves half of its gradients behind; a new forward starts afresh.
    if (forward_depth_ == 0 && backward_died()) reset();
    ++forward_depth_;
    if (!forward_tape_) forward_tape_ = schedule_.new_tape();
    open.tape = forward_tape_;
    if (c10::GradMode::is_enabled()) open.call = schedule_.begin_call(*open.tape, unit);
  }
  open_calls_[static_cast<size_t>(unit)].push_back(std::move(open));
  units_[static_cast<size_t>(unit)]->unshard(scratch_, *stream_);
}

void Engine::unshard(int unit) { units_[static_cast<size_t>(unit)]->unshard(scratch_, *stream_); }

void Engine::reshard(int unit) { units_[static_cast<size_t>(unit)]->reshard(/*release=*/true); }

void Engine::watch_outputs(int unit, const std::vector<at::Tensor>& outputs) {
  if (open_calls_[static_cast<size_t>(unit)].empty()) return;
  OpenCall& open = open_calls_[static_cast<size_t>(unit)].back();
  if (open.call < 0) return;
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    open.is_watched = true;
    // The hook owns the tape: a graph that is dropped takes its tape with it.
    output.register_hook([weak = weak_from_this(), open, unit](const at::Tensor&) {
      if (const std::shared_ptr<Engine> engine = weak.lock()) engine->enter_backward(open, unit);
    });
  }
}

void Engine::post_forward(int unit, bool failed) {
  std::vector<OpenCall>& calls = open_calls_[static_cast<size_t>(unit)];
  if (calls.empty()) return;
  const OpenCall open = std::move(calls.back());
  calls.pop_back();
  if (open.call >= 0) {
    if (open.is_watched && !failed) {
      schedule_.end_call(*open.tape, open.call, unit);
    } else {
      schedule_.cancel_call(*open.tape, open.call);
    }
  }
  // Inside backward the schedule alone reshards: the recomputed forward's backward is still to
  // come.
  if (open.is_recomputation) return;
  Unit& resharded = *units_[static_cast<size_t>(unit)];
  resharded.reshard(failed || resharded.settings().reshard_after_forward);
  if (--forward_depth_ == 0) forward_tape_ = nullptr;
}

bool Engine::backward_died() const {
  return backward_started_ && backward_alive_.expired() && !manual_finalization_;
}

void Engine::begin_backward() {
  if (!backward_alive_.expired()) return;
  if (backward_died()) {
    // No forward came between: only what the dead backward left is dropped.
    for (const std::shared_ptr<Unit>& unit : units_) unit->reset();
    (void)schedule_.finish_backward();
  }
  const auto alive = std::make_shared<int>(0);
  backward_alive_ = alive;
  backward_started_ = true;
  // Autograd destroys the callback with the outermost graph task, and `alive` with it.
  torch::autograd::Engine::get_default_engine().queue_callback([alive, weak = weak_from_this()] {
    const std::shared_ptr<Engine> engine = weak.lock();
    if (engine && !engine->manual_finalization_) engine->finish_backward();
  });
}

void Engine::enter_backward(const OpenCall& entered, int unit) {
  begin_backward();
  run(schedule_.enter_backward(entered.tape, entered.call, unit,
                               torch::autograd::get_current_graph_task_id()));
  if (*entered.is_entered) return;
  *entered.is_entered = true;
  for (const int ahead : backward_prefetch_[static_cast<size_t>(unit)]) unshard(ahead);
}

void Engine::set_backward_prefetch(int unit, std::vector<int> ahead) {
  backward_prefetch_[static_cast<size_t>(unit)] = std::move(ahead);
}

void Engine::run(const std::vector<Action>& actions) {
  for (const Action& action : actions) {
    Unit& unit = *units_[static_cast<size_t>(action.unit)];
    switch (action.kind) {
      case ActionKind::kGather:
        if (unit.settings().unshard_in_backward) unit.unshard(scratch_, *stream_);
        break;
      case ActionKind::kReduce:
        reduce(unit);
        break;
      case ActionKind::kReshard:
        unit.reshard(unit.settings().reshard_after_backward);
        break;
    }
  }
}

void Engine::reduce(Unit& unit) {
  if (!unit.settings().reduce_gradients) return unit.defer_reduce();
  unit.reduce(scratch_, *stream_);
  if (unit.settings().synchronize_gradients) unit.synchronize(*stream_);
}

void Engine::finish_backward() {
  run(schedule_.finish_backward());
  recomputation_tape_ = nullptr;
  backward_started_ = false;
  synchronize_pending();
}

// At a boundary: hop 2 for units that this backward did not touch but earlier micro-steps did, then
// makes the gradients visible.
void Engine::synchronize_pending() {
  int64_t num_flags = 0;
  std::vector<Unit*> finished;
  for (auto it = units_.rbegin(); it != units_.rend(); ++it) {
    Unit& unit = **it;
    if (!unit.settings().reduce_gradients || !unit.settings().synchronize_gradients) continue;
    if (unit.is_deferred()) unit.reduce(scratch_, *stream_);
    unit.synchronize(*stream_);
    if (!unit.has_hidden_gradient()) continue;
    finished.push_back(&unit);
    num_flags += unit.num_trainable();
  }
  if (finished.empty()) return;
  // A parameter that no rank used keeps `.grad` None, as in one process; one that some rank used
  // has a gradient on all. One small reduction tells.
  at::Tensor flags = at::empty({num_flags}, at::kLong);
  auto* flag = flags.mutable_data_ptr<int64_t>();
  for (const Unit* unit : finished) {
    for (const bool is_used : unit->used()) *flag++ = is_used ? 1 : 0;
  }
  if (control_ != nullptr) {
    // The transport of the control group is that of the shards.
    const at::Tensor on_device = flags.to(finished.front()->device());
    control_->all_reduce(on_device, *stream_);
    flags = on_device.to(at::kCPU);
  }
  flag = flags.mutable_data_ptr<int64_t>();
  for (Unit* unit : finished) {
    std::vector<bool> is_used;
    for (int i = 0; i < unit->num_trainable(); ++i) is_used.push_back(*flag++ > 0);
    unit->expose(is_used);
  }
}

std::vector<std::string> Engine::unfinished_units() const {
  std::vector<std::string> names;
  for (const std::shared_ptr<Unit>& unit : units_) {
    if (unit->has_pending() || unit->has_hidden_gradient() || unit->has_full_gradient()) {
      names.push_back(unit->name());
    }
  }
  return names;
}

bool Engine::matches_requires_grad() const {
  return std::all_of(units_.begin(), units_.end(), [](const std::shared_ptr<Unit>& unit) {
    return unit->matches_requires_grad();
  });
}

void Engine::reset() {
  schedule_.reset();
  for (std::vector<OpenCall>& calls : open_calls_) calls.clear();
  forward_depth_ = 0;
  forward_tape_ = nullptr;
  recomputation_tape_ = nullptr;
  backward_alive_.reset();
  backward_started_ = false;
  for (const std::shared_ptr<Unit>& unit : units_) unit->reset();
}

}  // namespace mics
