// FullBuffer: the full parameters of one unit, there while unsharded, gone while sharded.
//
// All views share one StorageImpl for the life of the buffer. attach() points it at memory that it
// does not own; detach() points it at nothing. Tensors that autograd saved follow, because
// they hold the StorageImpl and not the memory. While detached the storage keeps its size and any
// access to its data raises, so a use outside the window is an error and not a read of freed
// memory.
//
//   attach()  ->  views readable  ->  detach()  ->  any access: "unit ... used while sharded"
//
// Thread safety: one thread at a time.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mics {

class FullBuffer {
 public:
  // `numel` elements of `dtype` on `device`; detached. `name` is the unit, for messages.
  FullBuffer(int64_t numel, at::ScalarType dtype, at::Device device, std::string name);

  // Views that outlive it raise when they are used.
  ~FullBuffer();
  FullBuffer(const FullBuffer&) = delete;
  FullBuffer& operator=(const FullBuffer&) = delete;

  // Uses the first nbytes() of `memory` (contiguous, on the buffer's device), which must stay until
  // detach(). Replaces memory attached before.
  void attach(const at::Tensor& memory);
  // Nothing when detached.
  void detach();
  [[nodiscard]] bool is_attached() const { return is_attached_; }
  [[nodiscard]] int64_t nbytes() const { return nbytes_; }

  // A tensor of `sizes`, contiguous, `offset` elements into the buffer. Made without reading
  // memory, so it can be made while detached. It has a version counter of its own: writing through
  // another view does not count as a change of this one.
  [[nodiscard]] at::Tensor view(int64_t offset, const std::vector<int64_t>& sizes) const;

 private:
  void raise_on_use(const std::string& when);

  const at::ScalarType dtype_;
  const at::Device device_;
  const std::string name_;
  const int64_t nbytes_;
  c10::Storage storage_;
  bool is_attached_ = false;
};

}  // namespace mics
