// BoundaryAgreement: what all ranks tell each other at an accumulation boundary, in one small
// all-reduce of int64: which parameters had a gradient anywhere, and the digest of what each rank
// started.
//
//   sum(used, memory)   starts it, and waits only where a parameter has no gradient here
//   check(memory)       after the gradients have come: throws when ranks ran units in another order
//
// On the stream gather_rail, which is idle at a boundary: behind the replicas' all-reduces it would
// come last.
//
// Thread safety: one thread at a time. Not to be used with the GIL held.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "mics/communicator.h"
#include "mics/runtime_streams.h"
#include "mics/unit.h"
#include "runtime/step_digest.h"

namespace mics {

class BoundaryAgreement {
 public:
  // `control` has all ranks of the world; null: one rank, nothing to agree on. All outlive it.
  BoundaryAgreement(const std::vector<std::shared_ptr<Unit>>& units, Communicator* control,
                    RuntimeStreams& streams, StepDigest& digest);

  // Numbers of int64 that a boundary of all units may take; 0 with one rank.
  [[nodiscard]] int64_t numel() const;

  // `used`: what had a gradient on this rank, the same parameters on every rank. Returns what had
  // one on any rank. `memory` [numel()] int64 is in use until the end of check().
  [[nodiscard]] std::vector<bool> sum(const std::vector<bool>& used, const at::Tensor& memory);
  // Throws CommError, on every rank, that names the first difference since the last boundary; the
  // digest starts afresh. On CPUs only: on a device a look would stop the host. `memory` as given
  // to the last sum().
  void check(const at::Tensor& memory);
  // Releases `memory`; the streams must be empty.
  void release_finished() {
    if (control_ != nullptr) control_->release_finished();
  }
  // After an exception: forgets what is in flight. The streams must be empty.
  void reset();

 private:
  const std::vector<std::shared_ptr<Unit>>& units_;
  Communicator* const control_;
  RuntimeStreams& streams_;
  StepDigest& digest_;
  const std::unique_ptr<Event> written_;
  std::unique_ptr<Event> summed_;
};

}  // namespace mics
