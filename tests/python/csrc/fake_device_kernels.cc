// Operations of the fake device. One kernel does almost all: it refuses what a GPU refuses, runs the
// CPU's kernel on the same memory, and takes over what that has made.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/adaption.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/copy_native.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "fake_device.h"

namespace mics::testing {
namespace {

bool is_fake(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kFakeDevice;
}

bool starts_with(const std::string& text, const std::string& start) {
  return text.rfind(start, 0) == 0;
}

// Whether CUDA's kernel of the operation takes tensors of the CPU with no dimension as numbers.
bool takes_numbers_of_the_cpu(const c10::OperatorHandle& op) {
  static const std::set<std::string> others = {
      "aten::masked_fill", "aten::masked_fill_", "aten::fill",  "aten::fill_", "aten::index_fill",
      "aten::index_fill_", "aten::where",        "aten::lerp_", "aten::lerp"};
  const std::string& name = op.schema().name();
  return op.hasTag(at::Tag::pointwise) || others.count(name) > 0 ||
         starts_with(name, "aten::_foreach_");
}

// Whether CUDA's kernel moves tensors of the CPU itself.
bool takes_any_device(const c10::OperatorHandle& op) {
  static const std::set<std::string> names = {"aten::_foreach_copy_", "aten::index",
                                              "aten::index_put_", "aten::_index_put_impl_",
                                              "aten::_unsafe_index"};
  return names.count(op.schema().name()) > 0;
}

// The arguments of one call, over memory of the CPU.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const size_t first = stack_->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) {
      visit(stack_->at(first + i), [&](const at::Tensor& tensor) { note(tensor); });
    }
    TORCH_CHECK(device_.has_value(), op_.schema().name(), " has no tensor on the fake device");
    for (size_t i = 0; i < arguments.size(); ++i) {
      const auto* alias = arguments[i].alias_info();
      check(stack_->at(first + i), alias != nullptr && alias->isWrite());
      replace(stack_->at(first + i));
    }
    draw_and_call();
    for (const auto& [mine, host] : tensors_) follow(mine, host);
    for (size_t i = stack_->size() - op_.schema().returns().size(); i < stack_->size(); ++i) {
      take_over(stack_->at(i));
    }
  }

 private:
  template <typename F>
  static void visit(const c10::IValue& value, F use) {
    if (value.isTensor()) {
      use(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) use(tensor);
    } else if (value.isOptionalTensorList()) {
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (tensor.has_value()) use(*tensor);
      }
    }
  }

  void note(const at::Tensor& tensor) {
    if (is_fake(tensor) && !device_.has_value()) device_ = tensor.device();
  }

  void check(const c10::IValue& value, bool is_written) const {
    const bool any = takes_any_device(op_);
    const bool numbers = takes_numbers_of_the_cpu(op_);
    visit(value, [&](const at::Tensor& tensor) {
      if (!tensor.defined() || tensor.device() == *device_ || (any && !is_written)) return;
      if (numbers && !is_written && tensor.is_cpu() && tensor.dim() == 0) return;
      TORCH_CHECK(false, "Expected all tensors to be on the same device, but found ", *device_,
                  " and ", tensor.device(), ", a tensor of shape ", tensor.sizes(), ", in ",
                  op_.schema().name());
    });
  }

  at::Tensor host_of(const at::Tensor& tensor) {
    if (!is_fake(tensor)) return tensor;
    auto* impl = tensor.storage().unsafeGetStorageImpl();
    auto found = hosts_.find(impl);
    if (found == hosts_.end()) {
      found = hosts_.emplace(impl, host_alias(tensor.storage())).first;
      devices_.emplace(found->second.unsafeGetStorageImpl(), tensor.storage());
    }
    tensors_.emplace_back(tensor, host_alias(tensor, found->second));
    return tensors_.back().second;
  }

  void replace(c10::IValue& value) {
    if (value.isTensor()) {
      value = host_of(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> all = value.toTensorVector();
      for (at::Tensor& tensor : all) tensor = host_of(tensor);
      value = c10::List<at::Tensor>(all);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> all;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        all.push_back(tensor.has_value() ? std::optional(host_of(*tensor)) : std::nullopt);
      }
      value = all;
    } else if (value.isGenerator()) {
      generator_ = value.toGenerator();
      TORCH_CHECK(generator_->device() == *device_, "Expected a generator of ", *device_,
                  " but found one of ", generator_->device());
      value = c10::IValue();
    }
  }

  // The CPU's kernel draws from the CPU's generator: it has the state of the device's meanwhile.
  void draw_and_call() {
    const auto call = [&] {
      op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack_);
    };
    if (!op_.hasTag(at::Tag::nondeterministic_seeded)) return call();
    at::Generator mine = generator_.value_or(default_fake_generator(device_->index()));
    at::Generator host = at::detail::getDefaultCPUGenerator();
    const auto before = host.get_state();
    host.set_state(mine.get_state());
    call();
    mine.set_state(host.get_state());
    host.set_state(before);
  }

  // An argument that the kernel has resized.
  void follow(const at::Tensor& mine, const at::Tensor& host) const {
    if (mine.sizes() == host.sizes() && mine.strides() == host.strides()) return;
    c10::StorageImpl* to = mine.storage().unsafeGetStorageImpl();
    if (host.storage().data() != to->data()) {
      const c10::Storage taken = adopt_host_storage(host.storage(), *device_);
      to->set_data_ptr_noswap(
          std::move(taken.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
      to->set_nbytes(host.storage().nbytes());
    }
    mine.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(),
                                                      host.storage_offset());
  }

  at::Tensor taken(const at::Tensor& result) const {
    if (!result.defined() || !result.is_cpu()) return result;
    for (const auto& [mine, host] : tensors_) {
      if (host.is_same(result)) return mine;
    }
    const auto found = devices_.find(result.storage().unsafeGetStorageImpl());
    c10::Storage storage =
        found != devices_.end() ? found->second : adopt_host_storage(result.storage(), *device_);
    at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), result.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(),
                                                      result.storage_offset());
    return made;
  }

  void take_over(c10::IValue& value) const {
    if (value.isTensor()) {
      value = taken(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> all = value.toTensorVector();
      for (at::Tensor& tensor : all) tensor = taken(tensor);
      value = c10::List<at::Tensor>(all);
    }
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  std::optional<c10::Device> device_;
  std::optional<at::Generator> generator_;
  std::map<c10::StorageImpl*, c10::Storage> hosts_;         // by storage of the device
  std::map<c10::StorageImpl*, c10::Storage> devices_;       // by storage of the CPU
  std::vector<std::pair<at::Tensor, at::Tensor>> tensors_;  // of the device, of the CPU
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const std::set<std::string> reads = {"aten::_local_scalar_dense", "aten::equal",
                                              "aten::nonzero"};
  if (reads.count(op.schema().name()) > 0) count_host_read();
  Call(op, stack).run();
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout> /*layout*/, std::optional<at::Device> device,
                 std::optional<bool> /*pin_memory*/, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kFakeDevice, current_fake_device())));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), c10::GetAllocator(kFakeDevice),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
                         std::optional<at::Device> device, std::optional<bool> /*pin_memory*/) {
  const c10::DeviceGuard guard(device.value_or(c10::Device(kFakeDevice, current_fake_device())));
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
      c10::GetAllocator(kFakeDevice), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
      c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool /*non_blocking*/) {
  if (!is_fake(to)) count_host_read();
  host_alias(to).copy_(host_alias(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset,
                        c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset.guard_int(__FILE__, __LINE__));
  const auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !sizes.empty()) {
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride));
  }
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  const auto numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  const c10::SymInt size = numel;
  return set_storage(self, std::move(source), 0, c10::SymIntArrayRef(size), {});
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat> /*format*/) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(size));
  const auto nbytes = static_cast<size_t>(impl->numel() + impl->storage_offset()) * self.itemsize();
  if (nbytes > self.storage().nbytes()) {
    at::native::resize_bytes_nocuda(self.storage(), static_cast<int64_t>(nbytes));
  }
  return self;
}

// Lets `parameter.data = tensor` move a parameter to or from the device, as it may with CUDA.
bool may_take_data(const at::Tensor& self, const at::Tensor& from) {
  const auto is_plain = [](const at::Tensor& t) { return is_fake(t) || t.is_cpu(); };
  return is_plain(self) && is_plain(from);
}

void record_stream(at::Tensor&, c10::Stream) {}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("resize_", &resize);
  m.impl("_has_compatible_shallow_copy_type", &may_take_data);
  // torch would compose these of others, with other roundings than the CPU's kernels have.
  for (const char* name : {"native_layer_norm", "native_group_norm", "silu_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
  m.impl("record_stream", &record_stream);
}

}  // namespace
}  // namespace mics::testing
