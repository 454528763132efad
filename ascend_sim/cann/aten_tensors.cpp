#include "aten_tensors.h"

#include <ATen/EmptyTensor.h>

namespace ascend_sim {

at::Tensor host_view(const at::Tensor& device_tensor) {
  if (!is_on_npu(device_tensor)) return device_tensor;
  const c10::Storage& storage = device_tensor.storage();
  c10::DataPtr memory(const_cast<void*>(storage.data()), c10::Device(c10::DeviceType::CPU));
  auto borrowed = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(memory), nullptr, /*resizable=*/false);
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(std::move(borrowed)), c10::DispatchKeySet(c10::DispatchKey::CPU), device_tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(
      device_tensor.sizes(), device_tensor.strides(), device_tensor.storage_offset());
  if (device_tensor.is_conj()) view._set_conj(true);
  if (device_tensor.is_neg()) view._set_neg(true);
  return view;
}

at::Tensor same_memory(const at::Tensor& host_tensor) {
  if (!host_tensor.defined()) return host_tensor;
  const c10::TensorImpl& original = *host_tensor.unsafeGetTensorImpl();
  if (original.is_wrapped_number()) return host_tensor;
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(
      c10::Storage(host_tensor.storage()), original.key_set(), host_tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(
      host_tensor.sizes(), host_tensor.strides(), host_tensor.storage_offset());
  return view;
}

at::Tensor meta_copy(const at::Tensor& tensor) {
  const bool is_number = tensor.defined() && tensor.unsafeGetTensorImpl()->is_wrapped_number();
  if (!tensor.defined() || is_number) return tensor;
  return at::detail::empty_strided_meta(tensor.sizes(), tensor.strides(), tensor.scalar_type());
}

}  // namespace ascend_sim
