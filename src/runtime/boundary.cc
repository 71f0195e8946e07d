#include "runtime/boundary.h"

namespace mics {

Boundary::Boundary(const std::vector<std::shared_ptr<Unit>>& units, Communicator* control,
                   RuntimeStreams& streams, StepDigest& digest, GatherPipeline& gathers,
                   ReducePipeline& reduces)
    : units_(units),
      gathers_(gathers),
      reduces_(reduces),
      agreement_(units, control, streams, digest) {}

void Boundary::synchronize(const at::Tensor& flags, const std::function<void()>& check_hooks) {
  std::vector<int> finished;
  std::vector<bool> used;
  for (int index = static_cast<int>(units_.size()) - 1; index >= 0; --index) {
    if (!unit(index).settings().is_boundary()) continue;
    const UnitGradients& gradients = unit(index).gradients();
    if (gradients.is_deferred()) reduces_.reduce(index);
    reduces_.synchronize(index);
    if (!gradients.synchronized().defined()) continue;
    finished.push_back(index);
    used.insert(used.end(), gradients.used().begin(), gradients.used().end());
  }
  if (finished.empty()) return;
  // A parameter that no rank used keeps `.grad` None, as in one process; one that some rank used
  // gets a gradient on all ranks. One small reduction tells which.
  used = agreement_.sum(used, flags);
  for (const int index : finished) reduces_.wait(index);
  agreement_.check(flags);
  gathers_.note_boundary();
  check_hooks();
  publish(finished, used);
}

void Boundary::publish(const std::vector<int>& finished, const std::vector<bool>& used) {
  std::vector<std::vector<bool>> used_by_unit;
  auto flag = used.begin();
  for (const int index : finished) {
    const auto last = flag + unit(index).gradients().layout().num_parameters();
    used_by_unit.emplace_back(flag, last);
    unit(index).gradients().publish(used_by_unit.back());
    flag = last;
  }
  // Hooks run last: they may see all gradients, and step an optimizer.
  for (size_t i = 0; i < finished.size(); ++i) {
    unit(finished[i]).gradients().run_hooks(used_by_unit[i]);
  }
}

}  // namespace mics
