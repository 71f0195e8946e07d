#include "comm/c10d/staging.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <cstring>

namespace mics {

namespace {

// Copies `numel` elements at `to_offset` and `from_offset` of two contiguous tensors of one dtype.
void copy_span(const at::Tensor& to, int64_t to_offset, const at::Tensor& from, int64_t from_offset,
               int64_t numel) {
  if (numel == 0) return;
  if (!to.is_cpu()) {
    to.view({-1}).narrow(0, to_offset, numel).copy_(from.view({-1}).narrow(0, from_offset, numel));
    return;
  }
  // A unit has many small parameters: a tensor operation would cost more than copying their bytes.
  const auto size = static_cast<int64_t>(to.element_size());
  std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + to_offset * size,
              static_cast<const char*>(from.const_data_ptr()) + from_offset * size,
              static_cast<size_t>(numel * size));
}

}  // namespace

at::Tensor Staging::get(Buffer& buffer, const at::Tensor& like, int64_t numel) {
  at::Tensor& view = buffer.view;
  if (view.defined() && view.numel() == numel && view.scalar_type() == like.scalar_type() &&
      view.device() == like.device()) {
    return view;
  }
  const c10::InferenceMode no_inference(false);
  const int64_t nbytes = numel * static_cast<int64_t>(like.element_size());
  at::Tensor& memory = buffer.memory;
  if (!memory.defined() || memory.numel() < nbytes || memory.device() != like.device()) {
    if (memory.defined()) nbytes_ -= memory.numel();
    memory = at::empty({nbytes}, like.options().dtype(at::kByte));
    nbytes_ += nbytes;
  }
  view = memory.narrow(0, 0, nbytes).view(like.scalar_type());
  return view;
}

void pack_inputs(const std::vector<TensorPair>& pairs, const at::Tensor& message) {
  int64_t offset = 0;
  for (const TensorPair& pair : pairs) {
    copy_span(message, offset, pair.input, 0, pair.input.numel());
    offset += pair.input.numel();
  }
}

void pack_input_pieces(const std::vector<TensorPair>& pairs, int size, const at::Tensor& message) {
  int64_t offset = 0;
  for (int member = 0; member < size; ++member) {
    for (const TensorPair& pair : pairs) {
      const int64_t piece = pair.output.numel();
      copy_span(message, offset, pair.input, piece * member, piece);
      offset += piece;
    }
  }
}

void unpack_outputs(const at::Tensor& message, const std::vector<TensorPair>& pairs) {
  int64_t offset = 0;
  for (const TensorPair& pair : pairs) {
    copy_span(pair.output, 0, message, offset, pair.output.numel());
    offset += pair.output.numel();
  }
}

void unpack_output_pieces(const at::Tensor& message, int size,
                          const std::vector<TensorPair>& pairs) {
  int64_t offset = 0;
  for (int member = 0; member < size; ++member) {
    for (const TensorPair& pair : pairs) {
      const int64_t piece = pair.input.numel();
      copy_span(pair.output, piece * member, message, offset, piece);
      offset += piece;
    }
  }
}

}  // namespace mics
