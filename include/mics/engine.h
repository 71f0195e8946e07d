// Engine: carries out the schedule of one root module over its units. What the module hooks drive.
//
//   forward   call = pre_forward(u); watch_outputs(u, outputs); post_forward(u)
//   backward  runs by itself: hooks on the watched outputs, a callback at the outermost's end
//
// Sequence of collectives: decided by the Schedule alone, so it is the same on every rank that runs
// the same forwards. Every backward is an accumulation boundary for the units whose settings say
// so: then hop 2 follows hop 1 unit by unit, and `.grad` becomes visible when the backward is over.
//
// Thread safety: one thread at a time. Must not be called with the GIL held when a unit's exchange
// or gradient hook needs it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "mics/communicator.h"
#include "mics/schedule.h"
#include "mics/stream.h"
#include "mics/unit.h"

namespace mics {

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // `units` in the order of the module tree; `control` has all ranks of the world (null: one rank)
  // and outlives the engine. All operations go to `stream`.
  [[nodiscard]] static std::shared_ptr<Engine> create(std::vector<std::shared_ptr<Unit>> units,
                                                      Communicator* control,
                                                      std::unique_ptr<Stream> stream);

  [[nodiscard]] int num_units() const { return static_cast<int>(units_.size()); }
  [[nodiscard]] Unit& unit(int index) { return *units_[static_cast<size_t>(index)]; }

  // Start of a forward of `unit`: gathers it. Each call is ended by one post_forward().
  void pre_forward(int unit);
  // Gathers `unit` ahead of its forward (explicit prefetch, unshard()).
  void unshard(int unit);
  void reshard(int unit);
  // Units to gather, in this order, as soon as backward reaches a forward of `unit`.
  void set_backward_prefetch(int unit, std::vector<int> ahead);
  // Lets backward of the open forward of `unit` start at `outputs`; those that need no gradient are
  // passed over.
  void watch_outputs(int unit, const std::vector<at::Tensor>& outputs);
  // End of a forward of `unit`. `failed`: it threw; nothing of it is kept. Nothing when no forward
  // of the unit is open.
  void post_forward(int unit, bool failed);

  // Does what the end of a backward does, for callers that asked for manual finalisation.
  void finish_backward();
  void set_manual_finalization(bool is_manual) { manual_finalization_ = is_manual; }

  // Names of units whose gradients have not been synchronised since their last reduction.
  [[nodiscard]] std::vector<std::string> unfinished_units() const;
  // False when a parameter was frozen or unfrozen since its unit was made.
  [[nodiscard]] bool matches_requires_grad() const;

  // Drops everything in flight on this rank: open forwards, tapes, full parameters, pending
  // gradients. Shards, `.grad` and optimizer states stay. To be called on all ranks.
  void reset();

 private:
  Engine(std::vector<std::shared_ptr<Unit>> units, Communicator* control,
         std::unique_ptr<Stream> stream);

  // One forward between pre_forward and post_forward.
  struct OpenCall {
    int64_t call = -1;  // -1: autograd does not record
    std::shared_ptr<Tape> tape;
    bool is_watched = false;
    bool is_recomputation = false;     // inside a backward
    std::shared_ptr<bool> is_entered;  // shared by the hooks on the outputs
  };

  void begin_backward();
  void enter_backward(const OpenCall& entered, int unit);
  void run(const std::vector<Action>& actions);
  void reduce(Unit& unit);
  void synchronize_pending();
  [[nodiscard]] bool backward_died() const;

  // Constant after construction.
  const std::vector<std::shared_ptr<Unit>> units_;
  Communicator* const control_;
  const std::unique_ptr<Stream> stream_;

  Schedule schedule_;
  Scratch scratch_;
  std::vector<std::vector<int>> backward_prefetch_;  // per unit
  std::vector<std::vector<OpenCall>> open_calls_;    // per unit, innermost last
  int forward_depth_ = 0;                            // open forwards outside backward
  std::shared_ptr<Tape> forward_tape_;               // of the open root forward
  std::shared_ptr<Tape> recomputation_tape_;  // of a backward that began with a recomputation
  // Owned by the callback that autograd holds for the outermost backward: gone when that backward
  // has ended, by an exception too. A flag would stay set after an exception.
  std::weak_ptr<int> backward_alive_;
  bool backward_started_ = false;  // finish_backward() has not run since the last begin_backward()
  bool manual_finalization_ = false;
};

}  // namespace mics
