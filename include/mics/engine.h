// Engine: runs the units of one root module through forward and backward. Module hooks drive it.
//
//   forward   pre_forward(u); watch_outputs(u, outputs); post_forward(u)
//   backward  runs by itself: hooks on the watched outputs, a callback at the outermost's end
//
// Sequence of collectives: follows from the tape of forwards (Schedule) and the recorded execution
// order (Prefetcher) alone, so it is the same on every rank that runs the same forwards. Every
// backward is an accumulation boundary for the units whose settings say so: their hop 2 of
// reductions follows hop 1 unit by unit, and `.grad` becomes visible when the backward is over.
//
// Memory: allocated at the first gather, in one piece whose size follows from the units' settings;
// allocated again when those have changed, at the next forward of the root.
//
// Source: MiCS paper section 3; docs/design.md 6, 15, 16.
//
// Thread safety: one thread at a time. Must not be called with the GIL held: the streams' threads
// may need it. After an exception shards are valid; call reset() on all ranks.
#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "mics/communicator.h"
#include "mics/prefetch.h"
#include "mics/runtime_streams.h"
#include "mics/unit.h"

namespace mics {

class Boundary;
class GatherPipeline;
class OpenForwards;
class Prefetcher;
class ReducePipeline;
class RuntimeMemory;
class Schedule;
class StepDigest;
struct Action;
struct OpenCall;
struct Route;

struct EngineCallbacks {
  // Called at the start of a backward when match_requires_grad() is false: a parameter may have been
  // frozen for a forward in between, and the graph is older than that.
  std::function<void()> refresh;
  // Called at the start of an outermost forward and at a boundary when a sharded parameter may have
  // hooks that nothing here would run; throws where it has.
  std::function<void()> check_hooks;
};

// Time that the calling thread waited for communication that compute did not hide. About nothing
// where waits are a device's.
struct ExposedTime {
  std::chrono::nanoseconds gather{0};
  std::chrono::nanoseconds reduce{0};
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // `units` in the order of the module tree; `control` has all ranks of the world (null: one rank)
  // and outlives the engine. Throws InvalidArgument for no unit and as check_depths().
  [[nodiscard]] static std::shared_ptr<Engine> create(std::vector<std::shared_ptr<Unit>> units,
                                                      Communicator* control,
                                                      std::shared_ptr<RuntimeStreams> streams,
                                                      Depths depths = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  [[nodiscard]] const std::vector<std::shared_ptr<Unit>>& units() const { return units_; }

  // --- forward ---
  // A forward of `unit` begins: gathers it. Each call is ended by one post_forward().
  void pre_forward(int unit);
  // Lets backward of the open forward of `unit` start at `outputs`; those that need no gradient are
  // passed over. Without any, backward starts at the units inside or at the first gradient of a
  // full parameter, and the full parameters stay until then.
  void watch_outputs(int unit, const std::vector<at::Tensor>& outputs);
  // A forward of `unit` ends. `failed`: it threw; nothing of it is kept. Nothing when no forward of
  // the unit is open.
  void post_forward(int unit, bool failed);
  // A forward has begun and not returned.
  [[nodiscard]] bool is_in_forward() const;
  // A module other than the unit's own is about to use its full parameters, in an open forward:
  // they stay until the outermost forward returns. Nothing inside the unit's own forward, unless
  // `is_group`: then other modules of the unit are known to run.
  void lend(int unit, bool is_group);

  // --- explicit gathers ---
  // Gathers `unit` and puts its full parameters into the modules, until reshard().
  void unshard(int unit);
  // Starts to gather `unit`; it is kept until its next use.
  void prefetch(int unit);
  void reshard(int unit);
  // Units to gather, in this order, as soon as a forward or backward of `unit` begins; instead of
  // the recorded order. Empty: the recorded order.
  void set_prefetch(Phase phase, int unit, std::vector<int> ahead);
  // Between steps. Throws InvalidArgument as check_depths(), and while units are in use.
  void set_depths(const Depths& depths);
  // The shards of `units` were written, by an optimizer's step for example: what was gathered from
  // them is old. On all ranks alike. Writes that nobody tells of are seen by the next forward that
  // is not inside an accumulation.
  void note_written(const std::vector<int>& units);

  // --- backward ---
  // Does what the end of a backward does, for callers that asked for manual finalization.
  void finish_backward();
  void set_manual_finalization(bool is_manual) { manual_finalization_ = is_manual; }
  void set_callbacks(EngineCallbacks callbacks) { callbacks_ = std::move(callbacks); }

  // --- between steps ---
  // UnitGradients::change_trainable(). On all ranks alike; between forwards. A collective where a
  // gradient block holds a sum.
  void change_trainable(int unit, const std::vector<at::Tensor>& gradients, at::Tensor gradient);
  // Takes over the units of `older`, whose unit i is `units[i]` here: its graphs run backward here,
  // and what they have accumulated goes on. `older` must not be used again. Outside of forwards and
  // backwards; on all ranks alike, as hop 2 of gradient blocks may be due.
  void adopt(Engine& older, const std::vector<int>& units);
  // Drops the unit's gradients that are not visible. Keeps `.grad`.
  void drop_gradients(int unit);
  // Drops everything in flight on this rank: open forwards, tapes, full parameters, accumulated
  // gradients. Shards, `.grad` and optimizer states stay. To be called on all ranks.
  void reset();
  // Frees the runtime's memory until the next gather, with what was kept in it. Throws
  // InvalidArgument during an accumulation, or while a module holds full parameters.
  void release_memory();

  // --- reports ---
  // Plans the memory, if it is not there. No collective.
  const RuntimeMemory& memory();
  // Times that units were used in another order than recorded.
  [[nodiscard]] int64_t num_order_changes() const;
  // Since construction.
  [[nodiscard]] ExposedTime exposed(int unit) const;

 private:
  Engine(std::vector<std::shared_ptr<Unit>> units, Communicator* control,
         std::shared_ptr<RuntimeStreams> streams, Depths depths);

  [[nodiscard]] int num_units() const { return static_cast<int>(units_.size()); }
  [[nodiscard]] Unit& unit(int index) { return *units_[static_cast<size_t>(index)]; }
  void plan_memory();
  void ensure_memory();
  void drop_changed_memory();
  void drop_memory();
  void free_memory();
  void check_between_steps(const char* rule) const;
  void begin_phase(Phase phase);
  void begin_forward(int unit);
  [[nodiscard]] OpenCall open_forward(int unit);
  [[nodiscard]] OpenCall open_recomputation(int unit);
  void begin_request(int unit);
  void end_request(int unit);
  void begin_backward();
  void enter_backward(const OpenCall& entered, int unit);
  void watch(OpenCall& open, int unit, const std::vector<at::Tensor>& outputs);
  void watch_gradients(const OpenCall& opaque, int unit);
  void end_call(int unit, bool failed);
  void check_hooks() const;
  [[nodiscard]] bool is_outermost() const;
  void run(const std::vector<Action>& actions);
  void reduce(int unit);
  [[nodiscard]] bool has_failed() const;
  void reset_pipelines();
  [[nodiscard]] bool backward_died() const;

  const std::vector<std::shared_ptr<Unit>> units_;
  const std::shared_ptr<RuntimeStreams> streams_;
  Depths depths_;
  EngineCallbacks callbacks_;

  // Later ones refer to earlier ones.
  const std::unique_ptr<Schedule> schedule_;
  const std::unique_ptr<StepDigest> digest_;
  const std::unique_ptr<GatherPipeline> gathers_;
  const std::unique_ptr<Prefetcher> prefetcher_;
  const std::unique_ptr<ReducePipeline> reduces_;
  const std::unique_ptr<Boundary> boundary_;
  std::unique_ptr<RuntimeMemory> memory_;
  const std::unique_ptr<OpenForwards> forwards_;
  std::vector<std::shared_ptr<Route>> routes_;  // that lead here; the first is its own
  // Owned by the callback that autograd holds for the outermost backward: gone when that backward
  // has ended, by an exception too. A flag would stay set after an exception.
  std::weak_ptr<int> backward_alive_;
  bool backward_started_ = false;  // finish_backward() has not run since the last begin_backward()
  bool manual_finalization_ = false;
};

}  // namespace mics
