// A device for tests, under torch's name PrivateUse1: its memory is the host's, and work on it is done
// at once, by torch's kernels for CPUs. It is as strict as a GPU about which tensors may meet in one
// operation, and has random generators of its own.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <optional>

namespace mics::testing {

inline constexpr c10::DeviceType kFakeDevice = c10::DeviceType::PrivateUse1;
inline constexpr c10::DeviceIndex kNumFakeDevices = 4;

// Bytes of one device. Peak: since the last reset_peak().
struct FakeDeviceBytes {
  int64_t allocated = 0;
  int64_t peak = 0;
};
[[nodiscard]] FakeDeviceBytes fake_device_bytes();
void reset_fake_device_peak();

// How often the host read values of the device since the last call: on a GPU each waits for it.
[[nodiscard]] int64_t take_host_reads();
void count_host_read();

[[nodiscard]] c10::DeviceIndex current_fake_device();
void set_current_fake_device(c10::DeviceIndex index);
[[nodiscard]] const at::Generator& default_fake_generator(c10::DeviceIndex index);

// A storage on the device over memory that `host` owns, which it keeps.
[[nodiscard]] c10::Storage adopt_host_storage(const c10::Storage& host, c10::Device device);

// A tensor of the CPU over the same memory; undefined tensors and those of the CPU are given back.
[[nodiscard]] at::Tensor host_alias(const at::Tensor& tensor);
// The same, over a storage of the CPU that the caller has made for the tensor's.
[[nodiscard]] at::Tensor host_alias(const at::Tensor& tensor, const c10::Storage& host);
[[nodiscard]] c10::Storage host_alias(const c10::Storage& storage);

}  // namespace mics::testing
