// Memory, generators, guard and hooks of the fake device.
#include "fake_device.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

namespace mics::testing {

namespace {

std::mutex bytes_mutex;
FakeDeviceBytes bytes;
std::atomic<int64_t> host_reads = 0;
thread_local c10::DeviceIndex current = 0;

void add_bytes(int64_t nbytes) {
  const std::scoped_lock lock(bytes_mutex);
  bytes.allocated += nbytes;
  bytes.peak = std::max(bytes.peak, bytes.allocated);
}

// What the deleter of a DataPtr gets: the memory, or the storage of the CPU that has it.
struct Held {
  void* memory = nullptr;
  c10::Storage host;
  int64_t nbytes = 0;
};

void give_back(void* context) {
  const std::unique_ptr<Held> held(static_cast<Held*>(context));
  add_bytes(-held->nbytes);
  if (held->memory != nullptr) {
    std::memset(held->memory, 0xff, static_cast<size_t>(held->nbytes));  // nor after they are gone
  }
  std::free(held->memory);
}

class FakeAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t nbytes) override {
    const c10::Device device(kFakeDevice, current);
    if (nbytes == 0) return {nullptr, device};
    auto held = std::make_unique<Held>();
    held->memory = std::aligned_alloc(64, (nbytes + 63) / 64 * 64);
    held->nbytes = static_cast<int64_t>(nbytes);
    std::memset(held->memory, 0xff, nbytes);  // no numbers before they are written
    add_bytes(held->nbytes);
    void* memory = held->memory;
    return {memory, held.release(), &give_back, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t nbytes) const override {
    std::memcpy(to, from, nbytes);
  }
};

FakeAllocator allocator;

// Draws what a generator of the CPU with the same seed draws.
class FakeGenerator final : public c10::GeneratorImpl {
 public:
  explicit FakeGenerator(c10::DeviceIndex index)
      : GeneratorImpl(c10::Device(kFakeDevice, index),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host_(at::detail::createCPUGenerator()) {}

  void set_current_seed(uint64_t seed) override { host_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host_.set_offset(offset); }
  uint64_t get_offset() const override { return host_.get_offset(); }
  uint64_t current_seed() const override { return host_.current_seed(); }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return current_seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    host_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  FakeGenerator* clone_impl() const override {
    auto* copy = new FakeGenerator(device().index());
    copy->set_state(*get_state());
    return copy;
  }
  at::Generator host_;
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return kNumFakeDevices; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return std::exchange(current, index);
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return default_fake_generator(index);
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<FakeGenerator>(index < 0 ? current : index);
  }
  at::Device getDeviceFromPtr(void*) const override { return {kFakeDevice, current}; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    c10::DataPtr data = allocator.allocate(nbytes);
    if (nbytes > 0) std::memcpy(data.get(), storage.data(), std::min(nbytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(nbytes);
  }
};

// One stream per device, on which nothing is ever waiting.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return kFakeDevice; }
  c10::Device exchangeDevice(c10::Device device) const override {
    return {kFakeDevice, std::exchange(current, device.index())};
  }
  c10::Device getDevice() const override { return {kFakeDevice, current}; }
  void setDevice(c10::Device device) const override { current = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current = device.index(); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device.has_index() ? device : getDevice());
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getStream(device);
  }
  c10::Stream getNewStream(c10::Device device, int) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return kNumFakeDevices; }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}
};

Hooks hooks;
const bool is_registered = [] {
  c10::SetAllocator(kFakeDevice, &allocator);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

}  // namespace

FakeDeviceBytes fake_device_bytes() {
  const std::scoped_lock lock(bytes_mutex);
  return bytes;
}

void reset_fake_device_peak() {
  const std::scoped_lock lock(bytes_mutex);
  bytes.peak = bytes.allocated;
}

int64_t take_host_reads() { return host_reads.exchange(0); }
void count_host_read() { ++host_reads; }

c10::DeviceIndex current_fake_device() { return current; }
void set_current_fake_device(c10::DeviceIndex index) { current = index; }

const at::Generator& default_fake_generator(c10::DeviceIndex index) {
  static const std::vector<at::Generator> all = [] {
    std::vector<at::Generator> made;
    for (c10::DeviceIndex i = 0; i < kNumFakeDevices; ++i) {
      made.push_back(at::make_generator<FakeGenerator>(i));
    }
    return made;
  }();
  return all.at(static_cast<size_t>(index < 0 ? current : index));
}

c10::Storage adopt_host_storage(const c10::Storage& host, c10::Device device) {
  auto held = std::make_unique<Held>();
  held->host = host;
  held->nbytes = static_cast<int64_t>(host.nbytes());
  add_bytes(held->nbytes);
  void* memory = host.mutable_data();
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), host.nbytes(),
      c10::DataPtr(memory, held.release(), &give_back, device), &allocator, /*resizable=*/true);
}

c10::Storage host_alias(const c10::Storage& storage) {
  // Kept: a collective still reads it when the caller's tensor is gone.
  auto* kept = new c10::Storage(storage);
  const auto drop = [](void* context) { delete static_cast<c10::Storage*>(context); };
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
      c10::DataPtr(const_cast<void*>(storage.data()), kept, drop, c10::Device(c10::kCPU)),
      c10::GetCPUAllocator(), /*resizable=*/true);
}

at::Tensor host_alias(const at::Tensor& tensor, const c10::Storage& host) {
  at::Tensor alias = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(host), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                     tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    alias.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
  return alias;
}

at::Tensor host_alias(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != kFakeDevice) return tensor;
  return host_alias(tensor, host_alias(tensor.storage()));
}

}  // namespace mics::testing
