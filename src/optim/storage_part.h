// Parts of a buffer with storages of their own: the local tensors of DTensors over a flat shard.
//
//   buffer  [.. a a a a . b b b ..]
//   a = make_part(buffer, 2, {2, 2})
//   b = make_part(buffer, 7, {3})
//
// A part reads and writes the buffer's memory, but has a storage of its own that begins and ends
// with it and keeps the buffer's memory alive. torch copies and saves such a tensor, and DTensors
// over it, as any other. (It refuses to deepcopy a view at an offset, and saves a view with its whole
// buffer.) A part has its own version counter.
//
// Thread safety: any, as for tensors.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace mics {

// [sizes], contiguous, from element `offset` of `buffer` [numel] on. On the meta device, where
// there is no memory to share, a tensor of its own. Throws InternalError when it does not lie in
// the buffer.
[[nodiscard]] at::Tensor make_part(const at::Tensor& buffer, int64_t offset, at::IntArrayRef sizes);

// Where a tensor's first element lies: in the buffer of its part, or in its own storage.
struct Place {
  const void* storage = nullptr;  // tells buffers apart
  int64_t offset = 0;             // elements of the tensor's dtype
};
[[nodiscard]] Place place_of(const at::Tensor& tensor);

// The distance in elements from `first` to `second` when both lie in one buffer and are contiguous
// and of one dtype.
[[nodiscard]] std::optional<int64_t> distance_between(const at::Tensor& first,
                                                      const at::Tensor& second);

// [numel] of the buffer in which `first` lies, from its first element on.
[[nodiscard]] at::Tensor span_from(const at::Tensor& first, int64_t numel);

}  // namespace mics
