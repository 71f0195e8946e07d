// Staging: where the pieces of a grouped collective are packed into one message, and unpacked.
//
// Its memory grows to the largest message and is kept, so a training step makes no allocation here
// once every unit has been moved.
//
// Thread safety: one thread at a time; nbytes() from any.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "mics/communicator.h"

namespace mics {

class Staging {
 public:
  // Uninitialised memory [numel] of `like`'s dtype and device, valid until the next call for the
  // same purpose.
  [[nodiscard]] at::Tensor sent(const at::Tensor& like, int64_t numel) {
    return get(sent_, like, numel);
  }
  [[nodiscard]] at::Tensor received(const at::Tensor& like, int64_t numel) {
    return get(received_, like, numel);
  }
  [[nodiscard]] at::Tensor sum(const at::Tensor& like, int64_t numel) {
    return get(sum_, like, numel);
  }
  [[nodiscard]] int64_t nbytes() const { return nbytes_; }

 private:
  struct Buffer {
    at::Tensor memory;  // bytes
    at::Tensor view;    // what the last call gave: units are often alike
  };
  [[nodiscard]] at::Tensor get(Buffer& buffer, const at::Tensor& like, int64_t numel);

  Buffer sent_;
  Buffer received_;
  Buffer sum_;
  std::atomic<int64_t> nbytes_ = 0;
};

// message [numel] = the inputs of `pairs`, one after the other.
void pack_inputs(const std::vector<TensorPair>& pairs, const at::Tensor& message);
// message [size * numel]: part r = piece r of every input, one after the other.
void pack_input_pieces(const std::vector<TensorPair>& pairs, int size, const at::Tensor& message);
// The inverse of pack_inputs, for outputs.
void unpack_outputs(const at::Tensor& message, const std::vector<TensorPair>& pairs);
// The inverse of pack_input_pieces, for outputs.
void unpack_output_pieces(const at::Tensor& message, int size,
                          const std::vector<TensorPair>& pairs);

}  // namespace mics
