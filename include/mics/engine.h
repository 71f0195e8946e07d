// Engine: carries out the schedule of one root module over its units. What the module hooks drive.
//
//   forward   pre_forward(u); watch_outputs(u, outputs); post_forward(u)
//   backward  runs by itself: hooks on the watched outputs, a callback at the outermost's end
//
// Sequence of collectives: decided by the Schedule and by the recorded orders of use alone, so it
// is the same on every rank that runs the same forwards. From the second forward and backward on,
// gathers are started ahead in the recorded order, into the phase that followed the last time too,
// unless an optimizer step comes between; another order is gathered on demand, counted and
// recorded anew. Every backward is an accumulation boundary for the units whose settings say so:
// then hop 2 follows hop 1 unit by unit, and `.grad` becomes visible when the backward is over.
//
// Memory: allocated at the first gather, in one piece whose size follows from the units' settings;
// allocated anew when those have changed, at the next forward of the root.
//
// Thread safety: one thread at a time. Must not be called with the GIL held: the streams' threads
// may need it.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mics/boundary_agreement.h"
#include "mics/communicator.h"
#include "mics/gather_pipeline.h"
#include "mics/phase_orders.h"
#include "mics/reduce_pipeline.h"
#include "mics/runtime_memory.h"
#include "mics/runtime_streams.h"
#include "mics/schedule.h"
#include "mics/step_digest.h"
#include "mics/unit.h"

namespace mics {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // `units` in the order of the module tree; `control` has all ranks of the world (null: one rank)
  // and outlives the engine.
  [[nodiscard]] static std::shared_ptr<Engine> create(std::vector<std::shared_ptr<Unit>> units,
                                                      Communicator* control,
                                                      std::shared_ptr<RuntimeStreams> streams,
                                                      Depths depths = {});
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  [[nodiscard]] int num_units() const { return static_cast<int>(units_.size()); }
  [[nodiscard]] Unit& unit(int index) { return *units_[static_cast<size_t>(index)]; }

  // Start of a forward of `unit`: gathers it. Each call is ended by one post_forward().
  void pre_forward(int unit);
  // Gathers `unit` and puts its full parameters into the module, until reshard().
  void unshard(int unit);
  // Starts to gather `unit`; what is started is kept for the next use.
  void prefetch(int unit);
  void reshard(int unit);
  // The shards of `units` were written, by an optimizer's step for example: what was gathered from
  // them is old. On all ranks alike. Writes that nobody tells of are seen by the next forward that
  // is not inside an accumulation.
  void note_written(const std::vector<int>& units);
  // Units to gather, in this order, as soon as a forward or backward of `unit` begins; instead of
  // what was recorded. Empty: what was recorded.
  void set_forward_prefetch(int unit, std::vector<int> ahead);
  void set_backward_prefetch(int unit, std::vector<int> ahead);
  // Lets backward of the open forward of `unit` start at `outputs`; those that need no gradient are
  // passed over. Without any, backward starts at the units inside or at the first gradient of a
  // full parameter, and the full parameters stay until then.
  void watch_outputs(int unit, const std::vector<at::Tensor>& outputs);
  // A module other than the unit's own is about to use its full parameters, in an open forward:
  // they are there until the outermost forward returns. Nothing inside the unit's own forward,
  // unless `is_group`: then other modules of the unit are known to run.
  void lend(int unit, bool is_group);
  // A forward has begun and not returned.
  [[nodiscard]] bool is_in_forward() const { return forward_depth_ > 0; }
  // End of a forward of `unit`. `failed`: it threw; nothing of it is kept. Nothing when no forward
  // of the unit is open.
  void post_forward(int unit, bool failed);

  // Does what the end of a backward does, for callers that asked for manual finalisation.
  void finish_backward();
  void set_manual_finalization(bool is_manual) { manual_finalization_ = is_manual; }

  // Names of units whose gradients have not been synchronised since their last reduction.
  [[nodiscard]] std::vector<std::string> unfinished_units() const;
  // False when a parameter was frozen or unfrozen since its unit was told.
  [[nodiscard]] bool matches_requires_grad() const;
  // Unit::change_trainable(). On all ranks alike; between forwards. A collective where a gradient
  // block holds a sum.
  void change_trainable(int unit, const std::vector<at::Tensor>& gradients, at::Tensor gradient);
  // Called at the start of a backward when matches_requires_grad() is false: a parameter may have
  // been frozen for a forward in between, and its graph is older.
  void set_refresh(std::function<void()> refresh) { refresh_ = std::move(refresh); }
  // Called at the start of an outermost forward and at a boundary when a sharded parameter may have
  // hooks that nothing here would run; throws where it has.
  void set_hook_check(std::function<void()> check) { hook_check_ = std::move(check); }

  // Takes over the units of `older`, whose unit i is `units[i]` here: its graphs run backward here,
  // and what they have accumulated goes on. `older` must not be used again. Outside of forwards and
  // backwards; on all ranks alike, as hop 2 of gradient blocks may be due.
  void adopt(Engine& older, const std::vector<int>& units);

  // Drops the unit's gradients that have not become visible. Keeps `.grad`.
  void drop_gradients(int unit);
  // Drops everything in flight on this rank: open forwards, tapes, full parameters, pending
  // gradients. Shards, `.grad` and optimizer states stay. To be called on all ranks.
  void reset();

  // Frees the runtime's memory until the next gather, with what was kept in it.
  // Throws InvalidArgument during an accumulation, or while a module holds full parameters.
  void release_memory();
  // Plans the memory, if it is not there. For reports before the first step: no collective.
  const RuntimeMemory& memory();
  // Times that units were used in another order than recorded.
  [[nodiscard]] int64_t num_order_changes() const { return orders_.num_changes(); }
  // What the caller's thread has stood still since construction, for gathers and for reductions of
  // a unit: communication that compute does not hide. About nothing where waits are a device's.
  [[nodiscard]] std::chrono::nanoseconds exposed_gather(int unit) const {
    return gathers_.exposed(unit);
  }
  [[nodiscard]] std::chrono::nanoseconds exposed_reduce(int unit) const {
    return reduces_.exposed(unit);
  }

 private:
  Engine(std::vector<std::shared_ptr<Unit>> units, Communicator* control,
         std::shared_ptr<RuntimeStreams> streams, Depths depths);

  // One forward between pre_forward and post_forward.
  struct OpenCall {
    int64_t call = -1;  // -1: autograd does not record
    std::shared_ptr<Tape> tape;
    bool is_watched = false;
    bool is_opaque = false;         // no output was found
    bool is_recomputation = false;  // inside a backward
  };

  // Where hooks on a graph lead: to this engine, or to one that has adopted it.
  struct Route {
    std::weak_ptr<Engine> engine;
    std::vector<int> units;  // there, of those here
  };

  // What decides the plan of the memory.
  using MemoryKey = std::vector<std::array<int64_t, 4>>;

  void plan_memory();
  void ensure_memory();
  [[nodiscard]] MemoryKey memory_key() const;
  void drop_changed_memory();
  void drop_memory();
  void free_memory();
  // `unit` is needed now, as the `order` of the phase goes on.
  void use(int unit);
  void gather_ahead(int unit);
  void start_ahead();
  void rest(int unit, Residency residency);
  void begin_phase(PhaseOrders::Kind kind);
  [[nodiscard]] bool stays_full(int unit) const;
  [[nodiscard]] const std::vector<int>& upcoming(int depth);
  void begin_forward(int unit);
  [[nodiscard]] bool is_accumulating() const;
  void begin_request(int unit);
  void end_request(int unit);
  void start_retained(int unit);
  void end_phase();
  void begin_backward();
  void enter_backward(const OpenCall& entered, int unit);
  void watch(OpenCall& open, int unit, const std::vector<at::Tensor>& outputs);
  void end_call(int unit, bool failed);
  void check_hooks() const;
  [[nodiscard]] bool is_outermost() const;
  void run(const std::vector<Action>& actions);
  void reduce(int unit);
  void synchronize_pending();
  [[nodiscard]] bool has_failed() const;
  void reset_pipelines();
  [[nodiscard]] bool backward_died() const;

  // Constant after construction.
  const std::vector<std::shared_ptr<Unit>> units_;
  const Depths depths_;
  const std::shared_ptr<RuntimeStreams> streams_;

  Schedule schedule_;
  StepDigest digest_;
  GatherPipeline gathers_;
  ReducePipeline reduces_;
  std::unique_ptr<RuntimeMemory> memory_;
  MemoryKey memory_key_;
  BoundaryAgreement agreement_;
  PhaseOrders orders_;
  std::vector<std::vector<int>> forward_prefetch_;   // per unit
  std::vector<std::vector<int>> backward_prefetch_;  // per unit
  std::vector<int> upcoming_;                        // what upcoming() gave
  std::vector<std::shared_ptr<Route>> routes_;       // that lead here; the first is its own
  std::vector<std::vector<OpenCall>> open_calls_;    // per unit, innermost last
  int outermost_ = -1;                               // unit of the outermost forward
  std::vector<int> lent_;                            // until that returns
  std::vector<std::optional<OpenCall>> opaque_;      // per unit, the last that was
  std::function<void()> hook_check_;
  std::function<void()> refresh_;
  int forward_depth_ = 0;                     // open forwards outside backward
  std::shared_ptr<Tape> forward_tape_;        // of the open root forward
  std::shared_ptr<Tape> recomputation_tape_;  // of a backward that began with a recomputation
  // Owned by the callback that autograd holds for the outermost backward: gone when that backward
  // has ended, by an exception too. A flag would stay set after an exception.
  std::weak_ptr<int> backward_alive_;
  bool backward_started_ = false;  // finish_backward() has not run since the last begin_backward()
  bool manual_finalization_ = false;
};

}  // namespace mics
