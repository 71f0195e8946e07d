#include "optim/storage_part.h"

#include <ATen/ops/empty.h>
#include <c10/core/StorageImpl.h>

#include <memory>
#include <utility>

#include "plan/check.h"

namespace mics {

namespace {

// What the storage of a part keeps alive: the storage that it was cut from.
struct Whole {
  c10::Storage storage;
  int64_t offset_nbytes = 0;  // of the part in `storage`
};

void drop_whole(void* context) { delete static_cast<Whole*>(context); }

// Null if the tensor is not a part.
const Whole* whole_of(const at::Tensor& tensor) {
  if (!tensor.has_storage()) return nullptr;
  const at::DataPtr& memory = tensor.storage().data_ptr();
  if (memory.get_deleter() != &drop_whole) return nullptr;
  return static_cast<const Whole*>(memory.get_context());
}

at::Tensor over(c10::Storage storage, int64_t offset, at::IntArrayRef sizes,
                const at::TensorOptions& options) {
  const at::Tensor like = at::empty({0}, options);
  at::Tensor made =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), like.key_set(), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(offset);
  made.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return made;
}

}  // namespace

at::Tensor make_part(const at::Tensor& buffer, int64_t offset, at::IntArrayRef sizes) {
  const int64_t numel = c10::multiply_integers(sizes);
  MICS_INTERNAL_CHECK(offset >= 0 && offset + numel <= buffer.numel(), "a part of ", numel,
                      " elements at ", offset, " of ", buffer.numel(), ".");
  if (buffer.is_meta()) return at::empty(sizes, buffer.options());
  const auto itemsize = static_cast<int64_t>(buffer.element_size());
  auto whole = std::make_unique<Whole>(
      Whole{buffer.storage(), (buffer.storage_offset() + offset) * itemsize});
  char* const first = static_cast<char*>(buffer.mutable_data_ptr()) + offset * itemsize;
  at::DataPtr memory(first, whole.get(), &drop_whole, buffer.device());
  (void)whole.release();
  auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                       numel * itemsize, std::move(memory),
                                                       /*allocator=*/nullptr, /*resizable=*/false);
  return over(std::move(storage), 0, sizes, buffer.options());
}

Place place_of(const at::Tensor& tensor) {
  const Whole* const whole = whole_of(tensor);
  if (whole == nullptr) return {tensor.storage().unsafeGetStorageImpl(), tensor.storage_offset()};
  const auto itemsize = static_cast<int64_t>(tensor.element_size());
  return {whole->storage.unsafeGetStorageImpl(),
          whole->offset_nbytes / itemsize + tensor.storage_offset()};
}

std::optional<int64_t> distance_between(const at::Tensor& first, const at::Tensor& second) {
  if (first.scalar_type() != second.scalar_type() || !first.is_contiguous() ||
      !second.is_contiguous()) {
    return std::nullopt;
  }
  const Place from = place_of(first);
  const Place to = place_of(second);
  if (from.storage != to.storage) return std::nullopt;
  return to.offset - from.offset;
}

at::Tensor span_from(const at::Tensor& first, int64_t numel) {
  const Whole* const whole = whole_of(first);
  return over(whole == nullptr ? first.storage() : whole->storage, place_of(first).offset, {numel},
              first.options());
}

}  // namespace mics
