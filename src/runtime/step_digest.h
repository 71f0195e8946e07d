// StepDigest: the collectives that this rank has started since the last boundary, and whether all
// ranks started the same.
//
// Collectives match by their order alone. Where two ranks gather two units of one size in different
// orders nothing hangs and nothing fails, and both compute with a mixture of two units. So ranks
// add up a digest of the order at each boundary: every rank sees from the sums whether all agree,
// and all see the same.
//
// Thread safety: one thread at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "mics/communicator.h"

namespace mics {

class StepDigest {
 public:
  enum class Launch { kGatherRail, kGatherIntra, kReduce, kSynchronize };
  static constexpr size_t kNumWords = 2;
  // Launches that are kept to name a difference; later ones only count in the digest.
  static constexpr size_t kMaxKept = 1 << 14;

  void note(Launch launch, int unit);
  void clear();

  // Writes what all ranks add up, [kNumWords].
  void write(int64_t* words) const;
  // `sums`: of what `num_ranks` ranks wrote. False: not all wrote the same. A difference passes as
  // none about once in 16 million.
  [[nodiscard]] static bool are_equal(const int64_t* sums, int num_ranks);

  // The first launch in which ranks differ, and who did what. To be called by all ranks of
  // `control`.
  [[nodiscard]] std::string describe_difference(Communicator& control, Stream& stream,
                                                const std::vector<std::string>& units) const;

 private:
  static constexpr uint64_t kEmpty = 14695981039346656037ULL;

  uint64_t hash_ = kEmpty;
  std::vector<int64_t> launches_;
};

}  // namespace mics
