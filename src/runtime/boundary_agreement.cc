#include "runtime/boundary_agreement.h"

#include <algorithm>
#include <string>

#include "mics/error.h"

namespace mics {

namespace {

constexpr auto kNumWords = static_cast<int64_t>(StepDigest::kNumWords);

}  // namespace

BoundaryAgreement::BoundaryAgreement(const std::vector<std::shared_ptr<Unit>>& units,
                                     Communicator* control, RuntimeStreams& streams,
                                     StepDigest& digest)
    : units_(units),
      control_(control),
      streams_(streams),
      digest_(digest),
      written_(streams.compute->make_event()),
      summed_(streams.gather_rail->make_event()) {}

int64_t BoundaryAgreement::numel() const {
  if (control_ == nullptr) return 0;
  int64_t numel = kNumWords;
  for (const std::shared_ptr<Unit>& unit : units_) numel += unit->parameters().size();
  return numel;
}

std::vector<bool> BoundaryAgreement::sum(const std::vector<bool>& used, const at::Tensor& memory) {
  if (control_ == nullptr) return used;
  streams_.compute->wait(*summed_);  // of the last boundary
  const auto numel = kNumWords + static_cast<int64_t>(used.size());
  const at::Tensor flags = memory.narrow(0, 0, numel);
  std::vector<int64_t> words(static_cast<size_t>(numel));
  digest_.write(words.data());
  std::copy(used.begin(), used.end(), words.begin() + kNumWords);
  streams_.compute->write(flags, words);
  streams_.compute->note_write(flags, "flags of a boundary");
  streams_.compute->record(*written_);
  streams_.gather_rail->wait(*written_);
  control_->all_reduce(flags, *streams_.gather_rail);
  streams_.gather_rail->record(*summed_);
  // If all were used on this rank, the sum can tell nothing new: no wait.
  if (std::find(used.begin(), used.end(), false) == used.end()) return used;
  streams_.compute->wait(*summed_);
  streams_.compute->note_read(flags, "flags of a boundary");
  const at::Tensor on_host = flags.to(at::kCPU);
  const auto* flag = on_host.const_data_ptr<int64_t>() + kNumWords;
  std::vector<bool> used_anywhere(used.size());
  std::transform(flag, flag + used.size(), used_anywhere.begin(),
                 [](int64_t ranks) { return ranks > 0; });
  return used_anywhere;
}

// On a CPU this wait is short: compute has waited for reductions that ran beside the sum.
void BoundaryAgreement::check(const at::Tensor& memory) {
  if (control_ != nullptr && control_->moves_data() && memory.device().is_cpu()) {
    streams_.compute->wait(*summed_);
    streams_.compute->note_read(memory, "flags of a boundary");
    if (!StepDigest::are_equal(memory.const_data_ptr<int64_t>(), control_->group().size())) {
      std::vector<std::string> names;
      for (const std::shared_ptr<Unit>& unit : units_) names.push_back(unit->name());
      const std::string difference =
          digest_.describe_difference(*control_, *streams_.gather_rail, names);
      digest_.clear();
      throw CommError("all ranks must run the units in the same order: " + difference +
                      ". What was gathered and reduced since then is mixed up; shards are as they "
                      "were. Run the same modules in the same order on every rank, and call "
                      "reset() before the next step.");
    }
  }
  digest_.clear();
}

void BoundaryAgreement::reset() {
  summed_ = streams_.gather_rail->make_event();
  digest_.clear();
}

}  // namespace mics
