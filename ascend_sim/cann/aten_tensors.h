// Device memory seen by the CPU, and tensors without memory.
#pragma once

#include <ATen/core/Tensor.h>

namespace ascend_sim {

inline bool is_on_npu(const at::Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == c10::DeviceType::PrivateUse1;
}

// The memory of a device tensor as a CPU tensor. It holds no reference: that the memory lives until the
// stream gets there is the business of the caching allocator, and of its users, as on a device.
at::Tensor host_view(const at::Tensor& device_tensor);

// Another tensor of the same memory, type, sizes and strides: a kernel may change the latter of its own tensor.
at::Tensor same_memory(const at::Tensor& host_tensor);

// A tensor without memory, of the same type, sizes and strides; a Python number remains one.
at::Tensor meta_copy(const at::Tensor& tensor);

}  // namespace ascend_sim
