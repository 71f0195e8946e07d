#include "runtime/full_buffer.h"

#include <ATen/ops/empty.h>
#include <c10/core/StorageImpl.h>

#include <utility>

#include "plan/check.h"

namespace mics {

namespace {

// StorageImpl::throw_on_immutable_data_ptr_ makes every access raise, but torch has no public way
// to reset it. An explicit instantiation may name a private member, so this is checked at
// compile time: a torch without the member does not build.
template <bool c10::StorageImpl::* kMember>
struct AccessPrivate {
  friend bool c10::StorageImpl::* throw_flag() { return kMember; }
};
bool c10::StorageImpl::* throw_flag();
template struct AccessPrivate<&c10::StorageImpl::throw_on_immutable_data_ptr_>;

}  // namespace

FullBuffer::FullBuffer(int64_t numel, at::ScalarType dtype, at::Device device, std::string name)
    : dtype_(dtype),
      device_(device),
      name_(std::move(name)),
      nbytes_(numel * static_cast<int64_t>(c10::elementSize(dtype))),
      storage_(c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), nbytes_,
                                                     at::DataPtr(nullptr, device),
                                                     /*allocator=*/nullptr, /*resizable=*/false)) {
  // Starts detached.
  is_attached_ = true;
  detach();
}

void FullBuffer::attach(const at::Tensor& memory) {
  MICS_INTERNAL_CHECK(static_cast<int64_t>(memory.nbytes()) >= nbytes_, "unit \"", name_, "\" got ",
                      memory.nbytes(), " bytes for ", nbytes_, ".");
  c10::StorageImpl* storage = storage_.unsafeGetStorageImpl();
  storage->*throw_flag() = false;
  storage->set_data_ptr_noswap(at::DataPtr(memory.mutable_data_ptr(), device_));  // no deleter
  is_attached_ = true;
}

FullBuffer::~FullBuffer() {
  raise_on_use(
      "after the unit was laid out anew or deleted. A graph from before to(), to_empty(), "
      "load_state_dict(assign=True) or materialize() cannot run backward: run the forward again.");
}

void FullBuffer::detach() {
  if (!is_attached_) return;
  raise_on_use(
      "while it is sharded. Use them inside the unit's forward or backward, or call unshard().");
  is_attached_ = false;
}

void FullBuffer::raise_on_use(const std::string& when) {
  c10::StorageImpl* storage = storage_.unsafeGetStorageImpl();
  storage->set_data_ptr_noswap(at::DataPtr(nullptr, device_));
  storage->release_data_and_set_meta_custom_data_ptr_error_msg_(
      "full parameters may only be used while their unit is unsharded: got a use of unit \"" +
      name_ + "\" " + when);
}

at::Tensor FullBuffer::view(int64_t offset, const std::vector<int64_t>& sizes) const {
  // set_() would read the storage's pointer, which may be detached.
  const at::Tensor like = at::empty({0}, at::TensorOptions().dtype(dtype_).device(device_));
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage_), like.key_set(),
                                                             like.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(offset);
  view.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return view;
}

}  // namespace mics
