#include "runtime/step_digest.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <sstream>

namespace mics {

namespace {

std::string name_of(int64_t launch, const std::vector<std::string>& units) {
  if (launch < 0) return "nothing more";
  static constexpr const char* kNames[] = {"hop 1 of the gather", "hop 2 of the gather",
                                           "the reduction", "the synchronisation"};
  return std::string(kNames[launch % 4]) + " of \"" + units[static_cast<size_t>(launch / 4)] + '"';
}

// Each rank's `own` [numel], in rank order.
std::vector<int64_t> gather(Communicator& control, Stream& stream,
                            const std::vector<int64_t>& own) {
  const auto numel = static_cast<int64_t>(own.size());
  const at::Tensor input = at::empty({numel}, at::kLong);
  std::copy(own.begin(), own.end(), input.mutable_data_ptr<int64_t>());
  const at::Tensor output = at::empty({numel * control.group().size()}, at::kLong);
  control.all_gather(output, input, stream);
  stream.synchronize();
  const auto* first = output.const_data_ptr<int64_t>();
  return {first, first + output.numel()};
}

}  // namespace

void StepDigest::note(Launch launch, int unit) {
  const int64_t value = 4 * int64_t{unit} + static_cast<int64_t>(launch);
  hash_ = (hash_ ^ static_cast<uint64_t>(value)) * 1099511628211ULL;
  hash_ ^= hash_ >> 29;
  if (launches_.size() < kMaxKept) launches_.push_back(value);
}

void StepDigest::clear() {
  hash_ = kEmpty;
  launches_.clear();
}

// 24 bits, so that the sum of the squares of many thousand ranks fits an int64.
void StepDigest::write(int64_t* words) const {
  const uint64_t digest = (hash_ >> 40) & 0xffffff;
  words[0] = static_cast<int64_t>(digest);
  words[1] = static_cast<int64_t>(digest * digest);
}

// n * sum(d^2) = (sum d)^2 only if all d are equal; unsigned arithmetic wraps alike on both sides.
bool StepDigest::are_equal(const int64_t* sums, int num_ranks) {
  const auto sum = static_cast<uint64_t>(sums[0]);
  const auto sum_of_squares = static_cast<uint64_t>(sums[1]);
  return static_cast<uint64_t>(num_ranks) * sum_of_squares == sum * sum;
}

std::string StepDigest::describe_difference(Communicator& control, Stream& stream,
                                            const std::vector<std::string>& units) const {
  const c10::InferenceMode no_inference(false);
  const c10::NoGradGuard no_grad;
  const std::vector<int64_t> counts =
      gather(control, stream, {static_cast<int64_t>(launches_.size())});
  const auto longest = static_cast<size_t>(*std::max_element(counts.begin(), counts.end()));
  std::vector<int64_t> own = launches_;
  own.resize(longest, -1);
  const std::vector<int64_t> all = gather(control, stream, own);
  const size_t num_ranks = counts.size();
  size_t place = 0;
  const auto launch_of = [&](size_t rank) { return all[rank * longest + place]; };
  const auto is_common = [&] {
    for (size_t rank = 1; rank < num_ranks; ++rank) {
      if (launch_of(rank) != launch_of(0)) return false;
    }
    return true;
  };
  while (place < longest && is_common()) ++place;
  std::map<int64_t, std::vector<int>> ranks_by_launch;
  for (size_t rank = 0; place < longest && rank < num_ranks; ++rank) {
    ranks_by_launch[launch_of(rank)].push_back(control.group().world_ranks[rank]);
  }
  std::ostringstream text;
  text << "collective " << place + 1 << " since the last boundary is ";
  const char* separator = "";
  for (const auto& [launch, ranks] : ranks_by_launch) {
    text << separator << name_of(launch, units) << " on world_ranks [";
    for (size_t i = 0; i < ranks.size(); ++i) text << (i == 0 ? "" : " ") << ranks[i];
    text << ']';
    separator = ", ";
  }
  return text.str();
}

}  // namespace mics
