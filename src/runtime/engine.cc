#include "mics/engine.h"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "plan/check.h"
#include "plan/schedule.h"
#include "runtime/boundary.h"
#include "runtime/gather_pipeline.h"
#include "runtime/open_forwards.h"
#include "runtime/prefetcher.h"
#include "runtime/reduce_pipeline.h"
#include "runtime/runtime_memory.h"
#include "runtime/step_digest.h"

namespace mics {

namespace {

bool is_inside_autograd() { return torch::autograd::get_current_graph_task_id() != -1; }

}  // namespace

std::shared_ptr<Engine> Engine::create(std::vector<std::shared_ptr<Unit>> units,
                                       Communicator* control,
                                       std::shared_ptr<RuntimeStreams> streams, Depths depths) {
  const std::shared_ptr<Engine> engine(
      new Engine(std::move(units), control, std::move(streams), depths));
  engine->routes_.push_back(std::make_shared<Route>(Route{engine, {}}));
  for (int unit = 0; unit < engine->num_units(); ++unit) {
    engine->routes_.front()->units.push_back(unit);
  }
  return engine;
}

Engine::Engine(std::vector<std::shared_ptr<Unit>> units, Communicator* control,
               std::shared_ptr<RuntimeStreams> streams, Depths depths)
    : units_(std::move(units)),
      streams_(std::move(streams)),
      depths_(depths),
      schedule_(std::make_unique<Schedule>(num_units())),
      digest_(std::make_unique<StepDigest>()),
      gathers_(std::make_unique<GatherPipeline>(units_, *streams_, *digest_)),
      prefetcher_(std::make_unique<Prefetcher>(units_, *gathers_, depths_)),
      reduces_(std::make_unique<ReducePipeline>(units_, depths_, *streams_, *digest_)),
      boundary_(
          std::make_unique<Boundary>(units_, control, *streams_, *digest_, *gathers_, *reduces_)),
      forwards_(std::make_unique<OpenForwards>(units_.size())) {}

// Waits for queued work, which uses the communicators.
Engine::~Engine() {
  for (Stream* stream : streams_->communication()) {
    try {
      stream->synchronize();
    } catch (...) {  // a failure that nobody has waited for
    }
  }
}

// --- memory ---

void Engine::plan_memory() {
  if (memory_ != nullptr) return;
  memory_ = std::make_unique<RuntimeMemory>(units_, depths_, *streams_->compute,
                                            boundary_->agreement().numel());
  gathers_->set_memory(memory_.get());
  reduces_->set_memory(memory_.get());
}

// Called at the same points on all ranks, because registering memory is collective.
void Engine::ensure_memory() {
  plan_memory();
  if (memory_->needs_registration()) {
    for (Stream* stream : streams_->communication()) stream->synchronize();
    memory_->register_with(units_);
  }
  gathers_->order_after_shard_writes();
}

// Drops the memory if settings have changed since it was planned, and nothing is in it.
void Engine::drop_changed_memory() {
  if (memory_ != nullptr && !gathers_->is_any_in_use() && !reduces_->holds_block() &&
      !memory_->is_planned_for(units_)) {
    drop_memory();
  }
}

// Call only while no module holds full parameters and no gradient block holds a sum.
void Engine::drop_memory() {
  for (Stream* stream : streams_->communication()) stream->synchronize();
  gathers_->reset();
  free_memory();
}

// The streams are idle, but communicators still hold the memory of their last operations.
void Engine::free_memory() {
  for (Communicator* communicator : hop_communicators(units_)) communicator->release_finished();
  boundary_->agreement().release_finished();
  memory_ = nullptr;
}

void Engine::check_between_steps(const char* rule) const {
  MICS_CHECK(!gathers_->is_any_in_use() && unfinished_units(units_).empty(), rule,
             ": a unit is unsharded, or an accumulation is under way. Call "
             "reshard(), finish the step, or call reset().");
}

void Engine::release_memory() {
  check_between_steps("memory can be released only between steps");
  drop_memory();
}

void Engine::set_depths(const Depths& depths) {
  check_depths(depths);
  check_between_steps("prefetch depths can be changed only between steps");
  drop_memory();
  depths_ = depths;
  prefetcher_->set_depths(depths);
  reduces_->set_num_in_flight(depths.reductions);
}

const RuntimeMemory& Engine::memory() {
  plan_memory();
  return *memory_;
}

// --- forward ---

void Engine::begin_phase(Phase phase) {
  // Whether to prefetch past the phase: from a forward that records into its backward, and from a
  // backward that is no boundary into the next micro-step. After a boundary the shards are written.
  const auto is_boundary = [](const std::shared_ptr<Unit>& unit) {
    return unit->settings().is_boundary();
  };
  prefetcher_->begin(phase, phase == Phase::kForward
                                ? c10::GradMode::is_enabled()
                                : std::none_of(units_.begin(), units_.end(), is_boundary));
}

void Engine::pre_forward(int unit) {
  const bool is_recomputation = is_inside_autograd();
  // Comes first, because it may reset the engine.
  OpenCall open = is_recomputation ? open_recomputation(unit) : open_forward(unit);
  forwards_->calls(unit).push_back(std::move(open));
  if (is_recomputation && units_[static_cast<size_t>(unit)]->parameters().is_unsharded()) {
    gathers_->finish(unit);
  } else {
    prefetcher_->use(unit);
  }
}

OpenCall Engine::open_forward(int unit) {
  if (forwards_->depth == 0) begin_forward(unit);
  ++forwards_->depth;
  if (!forwards_->tape) forwards_->tape = schedule_->new_tape();
  OpenCall open;
  open.tape = forwards_->tape;
  if (c10::GradMode::is_enabled()) open.call = schedule_->begin_call(*open.tape, unit);
  return open;
}

OpenCall Engine::open_recomputation(int unit) {
  begin_backward();
  OpenCall open;
  open.is_recomputation = true;
  open.tape =
      schedule_->backward_tape() ? schedule_->backward_tape() : forwards_->recomputation_tape;
  if (!open.tape) open.tape = forwards_->recomputation_tape = schedule_->new_tape();
  if (c10::GradMode::is_enabled()) {
    std::vector<Action> actions;
    open.call = schedule_->begin_recomputed_call(
        *open.tape, unit, torch::autograd::get_current_graph_task_id(), actions);
    run(actions);
  }
  return open;
}

// Begins the outermost forward.
void Engine::begin_forward(int unit) {
  // A backward that threw leaves half of its gradients behind; a collective that threw leaves a
  // stream that drops its work. A new forward starts afresh.
  if (backward_died() || has_failed()) reset();
  check_hooks();
  drop_changed_memory();
  gathers_->begin_forward(/*is_new=*/!is_any_accumulating(units_), c10::GradMode::is_enabled());
  ensure_memory();
  begin_phase(Phase::kForward);
  forwards_->begin_outermost(unit);
}

void Engine::check_hooks() const {
  if (!callbacks_.check_hooks) return;
  const bool may_have_any =
      std::any_of(units_.begin(), units_.end(), [](const std::shared_ptr<Unit>& unit) {
        return unit->parameters().may_have_gradient_hooks();
      });
  if (may_have_any) callbacks_.check_hooks();
}

bool Engine::has_failed() const {
  const std::vector<Stream*> streams = streams_->communication();
  return std::any_of(streams.begin(), streams.end(),
                     [](const Stream* stream) { return stream->has_failed(); });
}

bool Engine::is_in_forward() const { return forwards_->depth > 0; }

bool Engine::is_outermost() const { return forwards_->depth == 1 && !is_inside_autograd(); }

void Engine::watch(OpenCall& open, int unit, const std::vector<at::Tensor>& outputs) {
  open.is_opaque = outputs.empty();
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    open.is_watched = true;
    // The hook owns the tape, so a graph that is dropped drops its tape too.
    output.register_hook([route = routes_.front(), open, unit](const at::Tensor&) {
      if (const std::shared_ptr<Engine> engine = route->engine.lock()) {
        engine->enter_backward(open, route->units[static_cast<size_t>(unit)]);
      }
    });
  }
}

void Engine::watch_outputs(int unit, const std::vector<at::Tensor>& outputs) {
  std::vector<OpenCall>& calls = forwards_->calls(unit);
  if (calls.empty()) return;
  if (is_outermost()) {
    for (const int lent : forwards_->lent) {
      OpenCall& open = forwards_->calls(lent).front();
      if (open.call >= 0) watch(open, lent, outputs);
    }
  }
  if (calls.back().call >= 0) watch(calls.back(), unit, outputs);
}

void Engine::lend(int unit, bool is_group) {
  Unit& lent = this->unit(unit);
  if (is_inside_autograd()) {
    // A recomputation; the forward that it repeats has lent the unit before.
    if (backward_alive_.expired() || lent.parameters().is_unsharded()) return;
    prefetcher_->use(unit);
    return schedule_->note_late_use(unit);
  }
  std::vector<OpenCall>& calls = forwards_->calls(unit);
  if (!is_in_forward() || unit == forwards_->outermost || (!calls.empty() && !is_group)) return;
  if (forwards_->is_lent(unit)) return;
  OpenCall open;
  open.tape = forwards_->tape;
  if (c10::GradMode::is_enabled()) open.call = schedule_->begin_lent_call(*open.tape, unit);
  // First in the list, because it ends after all others.
  calls.insert(calls.begin(), std::move(open));
  forwards_->lent.push_back(unit);
  lent.set_lent();
  prefetcher_->use(unit);
}

// For a call without outputs: its backward starts at the first gradient of a full parameter.
void Engine::watch_gradients(const OpenCall& opaque, int unit) {
  forwards_->opaque(unit) = opaque;
  this->unit(unit).gradients().watch([route = routes_.front(), unit] {
    const std::shared_ptr<Engine> engine = route->engine.lock();
    if (!engine) return;
    const int there = route->units[static_cast<size_t>(unit)];
    if (auto& last = engine->forwards_->opaque(there)) {
      engine->enter_backward(*std::exchange(last, std::nullopt), there);
    }
  });
}

// Ends the innermost call that is open.
void Engine::end_call(int unit, bool failed) {
  std::vector<OpenCall>& calls = forwards_->calls(unit);
  const OpenCall open = std::move(calls.back());
  calls.pop_back();
  const bool is_opaque = open.is_opaque && !failed;
  if (open.call >= 0) {
    if ((open.is_watched || is_opaque) && !failed) {
      schedule_->end_call(*open.tape, open.call, unit);
    } else {
      schedule_->cancel_call(*open.tape, open.call);
    }
  }
  if (is_opaque && !open.is_recomputation) watch_gradients(open, unit);
  // Inside backward only the schedule reshards: the backward of the recomputed forward is still
  // to come.
  if (open.is_recomputation || !calls.empty()) return;
  const Residency after = is_opaque && open.call >= 0
                              ? Residency::kFull
                              : this->unit(unit).settings().residency.after_forward;
  prefetcher_->rest(unit, failed ? Residency::kShard : after);
}

void Engine::post_forward(int unit, bool failed) {
  std::vector<OpenCall>& calls = forwards_->calls(unit);
  if (calls.empty()) return;
  const bool is_recomputation = calls.back().is_recomputation;
  if (!is_recomputation && is_outermost()) {
    for (const int lent : std::exchange(forwards_->lent, {})) end_call(lent, failed);
  }
  end_call(unit, failed);
  if (is_recomputation) return;
  // What backward needs first can be gathered while the loss is computed.
  if (!failed && forwards_->depth > 1) prefetcher_->look_past_forward();
  if (--forwards_->depth == 0) {
    forwards_->tape = nullptr;
    // What is prefetched from here on is for a backward.
    gathers_->end_forward();
    prefetcher_->end();
  }
}

// --- explicit gathers ---

// An explicit gather gives the weights as they are now, as the first forward of a step does.
void Engine::begin_request(int unit) {
  if (!is_in_forward() && backward_alive_.expired()) {
    gathers_->forget_request(unit);
    gathers_->begin_forward(/*is_new=*/!is_any_accumulating(units_), /*records=*/false);
  }
  ensure_memory();
}

void Engine::end_request(int unit) {
  gathers_->request(unit);
  if (!is_in_forward()) gathers_->end_forward();
}

void Engine::unshard(int unit) {
  begin_request(unit);
  gathers_->finish(unit);
  end_request(unit);
}

void Engine::prefetch(int unit) {
  begin_request(unit);
  prefetcher_->prefetch(unit);
  end_request(unit);
}

void Engine::reshard(int unit) { gathers_->reshard(unit, Residency::kShard); }

void Engine::set_prefetch(Phase phase, int unit, std::vector<int> ahead) {
  prefetcher_->set_list(phase, unit, std::move(ahead));
}

void Engine::note_written(const std::vector<int>& units) {
  for (const int unit : units) gathers_->note_written(unit);
}

// --- backward ---

bool Engine::backward_died() const {
  return backward_started_ && backward_alive_.expired() && !manual_finalization_;
}

void Engine::begin_backward() {
  if (!backward_alive_.expired()) return;
  if (backward_died()) {
    // No forward came in between: drop only what the dead backward left.
    reset_pipelines();
    (void)schedule_->finish_backward();
  }
  if (callbacks_.refresh && !match_requires_grad(units_)) {
    callbacks_.refresh();
    drop_changed_memory();
  }
  ensure_memory();
  begin_phase(Phase::kBackward);
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
  run(schedule_->enter_backward(entered.tape, entered.call, unit,
                                torch::autograd::get_current_graph_task_id()));
}

void Engine::run(const std::vector<Action>& actions) {
  for (const Action& action : actions) {
    const UnitSettings& settings = unit(action.unit).settings();
    switch (action.kind) {
      case ActionKind::kGather:
        if (settings.unshard_in_backward) {
          prefetcher_->use(action.unit);
        } else {
          prefetcher_->pass(action.unit);
        }
        break;
      case ActionKind::kGatherAgain:
        if (settings.unshard_in_backward) gathers_->finish(action.unit);
        break;
      case ActionKind::kReduce:
        reduce(action.unit);
        break;
      case ActionKind::kReshard:
        // A gather that this backward has not asked for may be a prefetch for what comes next.
        if (settings.unshard_in_backward || !gathers_->is_started(action.unit)) {
          prefetcher_->rest(action.unit, settings.residency.between_microsteps);
        }
        break;
    }
  }
}

void Engine::reduce(int index) {
  const UnitSettings& settings = unit(index).settings();
  if (!settings.reduce_gradients) return unit(index).gradients().defer();
  reduces_->reduce(index);
  if (settings.synchronize_gradients) reduces_->synchronize(index);
}

void Engine::finish_backward() {
  ensure_memory();
  run(schedule_->finish_backward());
  if (prefetcher_->is_open(Phase::kBackward)) prefetcher_->end();
  forwards_->recomputation_tape = nullptr;
  backward_started_ = false;
  boundary_->synchronize(memory_->flags(), [this] { check_hooks(); });
  reduces_->free_gradients();
}

// --- between steps ---

void Engine::change_trainable(int unit, const std::vector<at::Tensor>& gradients,
                              at::Tensor gradient) {
  reduces_->settle(unit);
  this->unit(unit).gradients().change_trainable(gradients, std::move(gradient));
}

void Engine::adopt(Engine& older, const std::vector<int>& units) {
  MICS_INTERNAL_CHECK(!older.is_in_forward() && older.backward_alive_.expired(),
                      "an engine that runs cannot be adopted.");
  for (int unit = 0; unit < older.num_units(); ++unit) older.reduces_->settle(unit);
  older.drop_memory();
  schedule_->adopt(*older.schedule_, units);
  for (const std::shared_ptr<Route>& route : older.routes_) {
    route->engine = weak_from_this();
    for (int& unit : route->units) unit = units[static_cast<size_t>(unit)];
    routes_.push_back(route);
  }
  for (int unit = 0; unit < older.num_units(); ++unit) {
    forwards_->opaque(units[static_cast<size_t>(unit)]) =
        std::exchange(older.forwards_->opaque(unit), std::nullopt);
  }
}

void Engine::drop_gradients(int unit) { reduces_->drop(unit); }

void Engine::reset_pipelines() {
  for (Stream* stream : streams_->communication()) stream->reset();
  gathers_->reset();
  reduces_->reset();
  boundary_->agreement().reset();
  free_memory();
}

void Engine::reset() {
  schedule_->reset();
  *forwards_ = OpenForwards(units_.size());
  gathers_->end_forward();
  backward_alive_.reset();
  backward_started_ = false;
  // The failure may be that ranks recorded different execution orders.
  prefetcher_->forget();
  reset_pipelines();
}

int64_t Engine::num_order_changes() const { return prefetcher_->num_order_changes(); }

ExposedTime Engine::exposed(int unit) const {
  return {gathers_->exposed(unit), reduces_->exposed(unit)};
}

}  // namespace mics
