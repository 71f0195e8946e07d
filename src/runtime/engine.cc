#include "mics/engine.h"

#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <span>
#include <utility>

#include "mics/check.h"
#include "mics/error.h"

namespace mics {

namespace {

// Units that need no gather and are passed over when looking ahead: bounds the host's work.
constexpr int kMaxPassedOver = 8;

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

void Engine::adopt(Engine& older, const std::vector<int>& units) {
  MICS_INTERNAL_CHECK(older.forward_depth_ == 0 && older.backward_alive_.expired(),
                      "an engine that runs cannot be adopted.");
  for (int unit = 0; unit < older.num_units(); ++unit) older.reduces_.settle(unit);
  older.drop_memory();
  schedule_.adopt(older.schedule_, units);
  for (const std::shared_ptr<Route>& route : older.routes_) {
    route->engine = weak_from_this();
    for (int& unit : route->units) unit = units[static_cast<size_t>(unit)];
    routes_.push_back(route);
  }
  for (size_t i = 0; i < units.size(); ++i) {
    opaque_[static_cast<size_t>(units[i])] = std::exchange(older.opaque_[i], std::nullopt);
  }
}

Engine::Engine(std::vector<std::shared_ptr<Unit>> units, Communicator* control,
               std::shared_ptr<RuntimeStreams> streams, Depths depths)
    : units_(std::move(units)),
      depths_(depths),
      streams_(std::move(streams)),
      schedule_(static_cast<int>(units_.size())),
      gathers_(units_, *streams_, digest_),
      reduces_(units_, depths_, *streams_, digest_),
      agreement_(units_, control, *streams_, digest_),
      orders_(static_cast<int>(units_.size())),
      forward_prefetch_(units_.size()),
      backward_prefetch_(units_.size()),
      open_calls_(units_.size()),
      opaque_(units_.size()) {
  upcoming_.reserve(static_cast<size_t>(std::max(depths_.intra, depths_.rail)));
}

// Queued work uses the communicators.
Engine::~Engine() {
  for (Stream* stream : streams_->communication()) {
    try {
      stream->synchronize();
    } catch (...) {  // a failure that nobody waited for
    }
  }
}

Engine::MemoryKey Engine::memory_key() const {
  MemoryKey key;
  for (const std::shared_ptr<Unit>& unit : units_) {
    key.push_back({unit->keeps_full(), unit->keeps_block(), unit->accumulates_block(),
                   unit->gradient_layout().shard_numel()});
  }
  return key;
}

void Engine::plan_memory() {
  if (memory_ != nullptr) return;
  memory_ =
      std::make_unique<RuntimeMemory>(units_, depths_, *streams_->compute, agreement_.numel());
  memory_key_ = memory_key();
  gathers_.set_memory(memory_.get());
  reduces_.set_memory(memory_.get());
}

// Where all ranks are, as the memory may have to be registered.
void Engine::ensure_memory() {
  plan_memory();
  if (memory_->needs_registration()) {
    for (Stream* stream : streams_->communication()) stream->synchronize();
    memory_->register_with(units_);
  }
  gathers_.order_after_shard_writes();
}

// Where the settings have changed since it was planned, and nothing is in it.
void Engine::drop_changed_memory() {
  if (memory_ != nullptr && !gathers_.holds_any() && !reduces_.holds_block() &&
      memory_key() != memory_key_) {
    drop_memory();
  }
}

// Only while no module holds full parameters and no gradient block holds a sum.
void Engine::drop_memory() {
  for (Stream* stream : streams_->communication()) stream->synchronize();
  gathers_.reset();
  free_memory();
}

// The streams are empty, but communicators hold what their last operations worked in.
void Engine::free_memory() {
  for (Communicator* communicator : hop_communicators(units_)) communicator->release_finished();
  agreement_.release_finished();
  memory_ = nullptr;
}

void Engine::release_memory() {
  MICS_CHECK(!gathers_.holds_any() && unfinished_units().empty(),
             "memory can only be released between steps: a unit is unsharded, or an accumulation "
             "is under way. Call reshard(), finish the step, or call reset().");
  drop_memory();
}

const RuntimeMemory& Engine::memory() {
  plan_memory();
  return *memory_;
}

void Engine::begin_phase(PhaseOrders::Kind kind) {
  // After a forward that records comes its backward; after a backward that is no boundary the next
  // micro-step. A boundary is followed by a write of the shards.
  const auto is_boundary = [](const std::shared_ptr<Unit>& unit) {
    return unit->settings().reduce_gradients && unit->settings().synchronize_gradients;
  };
  orders_.begin(kind, kind == PhaseOrders::Kind::kForward
                          ? c10::GradMode::is_enabled()
                          : std::none_of(units_.begin(), units_.end(), is_boundary));
}

void Engine::end_phase() {
  if (!orders_.end_uses()) gathers_.drop_unused();
  if (orders_.looks_past()) start_ahead();
  orders_.end();
}

// `unit` needs no gather for its next use: it is full, and will be when its module lets go of it.
bool Engine::stays_full(int unit) const {
  if (units_[static_cast<size_t>(unit)]->full_is_shard()) return true;
  if (!gathers_.is_kept_full(unit)) return false;
  if (!gathers_.is_held(unit)) return true;
  const ResidencySettings& residency = units_[static_cast<size_t>(unit)]->settings().residency;
  return (orders_.is_open(PhaseOrders::Kind::kBackward)
              ? residency.between_microsteps
              : residency.after_forward) == Residency::kFull;
}

// The next `depth` units to gather in the recorded order, as far as it is known.
const std::vector<int>& Engine::upcoming(int depth) {
  upcoming_.clear();
  const auto add = [&](int unit) {
    if (!stays_full(unit)) upcoming_.push_back(unit);
    return static_cast<int>(upcoming_.size()) < depth;
  };
  for (const int unit : orders_.upcoming(depth + kMaxPassedOver)) {
    if (!add(unit)) return upcoming_;
  }
  // A forward that is no part of an accumulation gathers for itself.
  if (orders_.is_forward_next() && !is_accumulating()) return upcoming_;
  for (const int unit : orders_.following(depth + kMaxPassedOver)) {
    // One that is held now is gathered again first.
    if (gathers_.is_held(unit) && !stays_full(unit)) break;
    if (!add(unit)) break;
  }
  return upcoming_;
}

void Engine::use(int unit) {
  if (!orders_.use(unit)) gathers_.drop_unused();
  // First what is needed now; then what comes, so that it moves while this one is waited for.
  MICS_INTERNAL_CHECK(gathers_.start_intra(unit, /*may_grow=*/true), "no memory for a gather.");
  gather_ahead(unit);
  gathers_.finish(unit);
}

void Engine::gather_ahead(int unit) {
  const std::vector<std::vector<int>>& lists =
      orders_.is_open(PhaseOrders::Kind::kBackward) ? backward_prefetch_ : forward_prefetch_;
  const std::vector<int>& explicit_list = lists[static_cast<size_t>(unit)];
  if (!explicit_list.empty()) {
    for (const int ahead : explicit_list) start_retained(ahead);
    return;
  }
  start_ahead();
}

void Engine::start_ahead() {
  for (const int ahead : upcoming(depths_.intra)) {
    if (!gathers_.start_intra(ahead, /*may_grow=*/false)) return;
  }
  for (const int ahead : upcoming(depths_.rail)) {
    if (!gathers_.start_rail(ahead, /*may_grow=*/false)) return;
  }
}

void Engine::rest(int unit, Residency residency) {
  // Only inside the phase: the last unit of a forward is gathered again for its backward, as the
  // byte counts of the plan say.
  const std::span<const int> next = orders_.upcoming(depths_.intra);
  if (residency != Residency::kFull && std::find(next.begin(), next.end(), unit) != next.end()) {
    return gathers_.keep(unit);
  }
  gathers_.reshard(unit, residency);
}

void Engine::pre_forward(int unit) {
  OpenCall open;
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
    if (forward_depth_ == 0) begin_forward(unit);
    ++forward_depth_;
    if (!forward_tape_) forward_tape_ = schedule_.new_tape();
    open.tape = forward_tape_;
    if (c10::GradMode::is_enabled()) open.call = schedule_.begin_call(*open.tape, unit);
  }
  const bool is_recomputation = open.is_recomputation;
  open_calls_[static_cast<size_t>(unit)].push_back(std::move(open));
  if (is_recomputation && units_[static_cast<size_t>(unit)]->is_unsharded()) {
    gathers_.finish(unit);
  } else {
    use(unit);
  }
}

// The outermost forward begins.
void Engine::begin_forward(int unit) {
  // A backward that threw leaves half of its gradients behind, a collective that threw a stream
  // that drops its work; a new forward starts afresh.
  if (backward_died() || has_failed()) reset();
  check_hooks();
  drop_changed_memory();
  gathers_.begin_forward(/*is_new=*/!is_accumulating(), c10::GradMode::is_enabled());
  ensure_memory();
  begin_phase(PhaseOrders::Kind::kForward);
  std::fill(opaque_.begin(), opaque_.end(), std::nullopt);
  outermost_ = unit;
}

void Engine::check_hooks() const {
  if (!hook_check_) return;
  const bool may_have_any =
      std::any_of(units_.begin(), units_.end(),
                  [](const std::shared_ptr<Unit>& unit) { return unit->may_have_hooks(); });
  if (may_have_any) hook_check_();
}

// A backward has run that was no boundary, and no boundary since. The same on every rank.
bool Engine::is_accumulating() const {
  return std::any_of(units_.begin(), units_.end(),
                     [](const std::shared_ptr<Unit>& unit) { return unit->is_accumulating(); });
}

void Engine::note_written(const std::vector<int>& units) {
  for (const int unit : units) gathers_.note_written(unit);
}

bool Engine::has_failed() const {
  const std::vector<Stream*> streams = streams_->communication();
  return std::any_of(streams.begin(), streams.end(),
                     [](const Stream* stream) { return stream->has_failed(); });
}

// Both give the weights as they are now, as the first forward of a step does.
void Engine::begin_request(int unit) {
  if (forward_depth_ == 0 && backward_alive_.expired()) {
    gathers_.forget_request(unit);
    gathers_.begin_forward(/*is_new=*/!is_accumulating(), /*records=*/false);
  }
  ensure_memory();
}

void Engine::end_request(int unit) {
  gathers_.request(unit);
  if (forward_depth_ == 0) gathers_.end_forward();
}

void Engine::unshard(int unit) {
  begin_request(unit);
  gathers_.finish(unit);
  end_request(unit);
}

void Engine::prefetch(int unit) {
  begin_request(unit);
  start_retained(unit);
  end_request(unit);
}

void Engine::start_retained(int unit) {
  MICS_INTERNAL_CHECK(gathers_.start_intra(unit, /*may_grow=*/true), "no memory for a gather.");
  gathers_.retain(unit);
}

void Engine::reshard(int unit) { gathers_.reshard(unit, Residency::kShard); }

void Engine::set_forward_prefetch(int unit, std::vector<int> ahead) {
  forward_prefetch_[static_cast<size_t>(unit)] = std::move(ahead);
}

void Engine::set_backward_prefetch(int unit, std::vector<int> ahead) {
  backward_prefetch_[static_cast<size_t>(unit)] = std::move(ahead);
}

void Engine::watch(OpenCall& open, int unit, const std::vector<at::Tensor>& outputs) {
  open.is_opaque = outputs.empty();
  for (const at::Tensor& output : outputs) {
    if (!output.requires_grad()) continue;
    open.is_watched = true;
    // The hook owns the tape: a graph that is dropped takes its tape with it.
    output.register_hook([route = routes_.front(), open, unit](const at::Tensor&) {
      if (const std::shared_ptr<Engine> engine = route->engine.lock()) {
        engine->enter_backward(open, route->units[static_cast<size_t>(unit)]);
      }
    });
  }
}

bool Engine::is_outermost() const { return forward_depth_ == 1 && !is_inside_autograd(); }

void Engine::watch_outputs(int unit, const std::vector<at::Tensor>& outputs) {
  std::vector<OpenCall>& calls = open_calls_[static_cast<size_t>(unit)];
  if (calls.empty()) return;
  if (is_outermost()) {
    for (const int lent : lent_) {
      OpenCall& open = open_calls_[static_cast<size_t>(lent)].front();
      if (open.call >= 0) watch(open, lent, outputs);
    }
  }
  if (calls.back().call >= 0) watch(calls.back(), unit, outputs);
}

void Engine::lend(int unit, bool is_group) {
  if (is_inside_autograd()) {
    // A recomputation: the forward that it repeats has lent the unit too.
    if (backward_alive_.expired() || units_[static_cast<size_t>(unit)]->is_unsharded()) return;
    use(unit);
    return schedule_.note_late_use(unit);
  }
  std::vector<OpenCall>& calls = open_calls_[static_cast<size_t>(unit)];
  if (forward_depth_ == 0 || unit == outermost_ || (!calls.empty() && !is_group)) return;
  if (std::find(lent_.begin(), lent_.end(), unit) != lent_.end()) return;
  OpenCall open;
  open.tape = forward_tape_;
  if (c10::GradMode::is_enabled()) open.call = schedule_.begin_lent_call(*forward_tape_, unit);
  // It ends after all others.
  calls.insert(calls.begin(), std::move(open));
  lent_.push_back(unit);
  units_[static_cast<size_t>(unit)]->set_lent();
  use(unit);
}

// Ends the innermost call that is open.
void Engine::end_call(int unit, bool failed) {
  std::vector<OpenCall>& calls = open_calls_[static_cast<size_t>(unit)];
  const OpenCall open = std::move(calls.back());
  calls.pop_back();
  const bool is_opaque = open.is_opaque && !failed;
  if (open.call >= 0) {
    if ((open.is_watched || is_opaque) && !failed) {
      schedule_.end_call(*open.tape, open.call, unit);
    } else {
      schedule_.cancel_call(*open.tape, open.call);
    }
  }
  if (is_opaque && !open.is_recomputation) {
    opaque_[static_cast<size_t>(unit)] = open;
    units_[static_cast<size_t>(unit)]->watch_gradients([route = routes_.front(), unit] {
      const std::shared_ptr<Engine> engine = route->engine.lock();
      if (!engine) return;
      const int there = route->units[static_cast<size_t>(unit)];
      if (auto& last = engine->opaque_[static_cast<size_t>(there)]) {
        engine->enter_backward(*std::exchange(last, std::nullopt), there);
      }
    });
  }
  // Inside backward the schedule alone reshards: the recomputed forward's backward is still to
  // come.
  if (open.is_recomputation || !calls.empty()) return;
  const ResidencySettings& residency = units_[static_cast<size_t>(unit)]->settings().residency;
  const Residency after = is_opaque && open.call >= 0 ? Residency::kFull : residency.after_forward;
  rest(unit, failed ? Residency::kShard : after);
}

void Engine::post_forward(int unit, bool failed) {
  std::vector<OpenCall>& calls = open_calls_[static_cast<size_t>(unit)];
  if (calls.empty()) return;
  const bool is_recomputation = calls.back().is_recomputation;
  if (!is_recomputation && is_outermost()) {
    for (const int lent : std::exchange(lent_, {})) end_call(lent, failed);
  }
  end_call(unit, failed);
  if (is_recomputation) return;
  // The last one of the forward: what its backward needs first can move beside the loss.
  if (!failed && forward_depth_ > 1 && orders_.upcoming(1).empty()) start_ahead();
  if (--forward_depth_ == 0) {
    forward_tape_ = nullptr;
    // What is started ahead now is a backward's.
    gathers_.end_forward();
    end_phase();
  }
}

bool Engine::backward_died() const {
  return backward_started_ && backward_alive_.expired() && !manual_finalization_;
}

void Engine::begin_backward() {
  if (!backward_alive_.expired()) return;
  if (backward_died()) {
    // No forward came between: only what the dead backward left is dropped.
    reset_pipelines();
    (void)schedule_.finish_backward();
  }
  if (refresh_ && !matches_requires_grad()) {
    refresh_();
    drop_changed_memory();
  }
  ensure_memory();
  begin_phase(PhaseOrders::Kind::kBackward);
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
}

void Engine::run(const std::vector<Action>& actions) {
  for (const Action& action : actions) {
    const Unit& unit = *units_[static_cast<size_t>(action.unit)];
    switch (action.kind) {
      case ActionKind::kGather:
        if (unit.settings().unshard_in_backward) {
          use(action.unit);
        } else {
          gather_ahead(action.unit);
        }
        break;
      case ActionKind::kGatherAgain:
        if (unit.settings().unshard_in_backward) gathers_.finish(action.unit);
        break;
      case ActionKind::kReduce:
        reduce(action.unit);
        break;
      case ActionKind::kReshard:
        // One that this backward has not gathered may have been for what comes next.
        if (unit.settings().unshard_in_backward || !gathers_.is_started_ahead(action.unit)) {
          rest(action.unit, unit.settings().residency.between_microsteps);
        }
        break;
    }
  }
}

void Engine::reduce(int index) {
  Unit& unit = *units_[static_cast<size_t>(index)];
  if (!unit.settings().reduce_gradients) return unit.defer_reduce();
  reduces_.reduce(index);
  if (unit.settings().synchronize_gradients) reduces_.synchronize(index);
}

void Engine::finish_backward() {
  ensure_memory();
  run(schedule_.finish_backward());
  if (orders_.is_open(PhaseOrders::Kind::kBackward)) end_phase();
  recomputation_tape_ = nullptr;
  backward_started_ = false;
  synchronize_pending();
  reduces_.free_gradients();
}

// At a boundary: hop 2 for units that this backward did not touch but earlier micro-steps did, then
// makes the gradients visible.
void Engine::synchronize_pending() {
  std::vector<int> finished;
  std::vector<bool> used;
  for (int index = num_units() - 1; index >= 0; --index) {
    Unit& synchronized = unit(index);
    const UnitSettings& settings = synchronized.settings();
    if (!settings.reduce_gradients || !settings.synchronize_gradients) continue;
    if (synchronized.is_deferred()) reduces_.reduce(index);
    reduces_.synchronize(index);
    if (!synchronized.hidden().defined()) continue;
    finished.push_back(index);
    used.insert(used.end(), synchronized.used().begin(), synchronized.used().end());
  }
  if (finished.empty()) return;
  // A parameter that no rank used keeps `.grad` None, as in one process; one that some rank used
  // has a gradient on all. One small reduction tells.
  used = agreement_.sum(used, memory_->flags());
  for (const int index : finished) reduces_.wait(index);
  agreement_.check(memory_->flags());
  gathers_.note_boundary();
  check_hooks();
  std::vector<std::vector<bool>> used_by_unit;
  auto flag = used.begin();
  for (const int index : finished) {
    const auto last = flag + unit(index).num_trainable();
    used_by_unit.emplace_back(flag, last);
    unit(index).expose(used_by_unit.back());
    flag = last;
  }
  // Hooks see all gradients, and may step an optimizer.
  for (size_t i = 0; i < finished.size(); ++i) {
    unit(finished[i]).run_gradient_hooks(used_by_unit[i]);
  }
}

std::vector<std::string> Engine::unfinished_units() const {
  std::vector<std::string> names;
  for (const std::shared_ptr<Unit>& unit : units_) {
    if (unit->has_pending() || unit->hidden().defined() || unit->has_full_gradient()) {
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

void Engine::change_trainable(int unit, const std::vector<at::Tensor>& gradients,
                              at::Tensor gradient) {
  reduces_.settle(unit);
  units_[static_cast<size_t>(unit)]->change_trainable(gradients, std::move(gradient));
}

void Engine::drop_gradients(int unit) { reduces_.drop(unit); }

void Engine::reset_pipelines() {
  for (Stream* stream : streams_->communication()) stream->reset();
  gathers_.reset();
  reduces_.reset();
  agreement_.reset();
  free_memory();
}

void Engine::reset() {
  schedule_.reset();
  for (std::vector<OpenCall>& calls : open_calls_) calls.clear();
  lent_.clear();
  std::fill(opaque_.begin(), opaque_.end(), std::nullopt);
  forward_depth_ = 0;
  gathers_.end_forward();
  forward_tape_ = nullptr;
  recomputation_tape_ = nullptr;
  backward_alive_.reset();
  backward_started_ = false;
  // What went wrong may be that ranks recorded different orders.
  orders_.forget();
  reset_pipelines();
}

}  // namespace mics
