#include "aten_operator.h"

#include "aten_stream.h"
#include "aten_tensors.h"
#include "aten_values.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

namespace ascend_sim {
namespace {

using torch::jit::Stack;

Stack pop_arguments(Stack* stack, size_t count) {
  Stack arguments(std::make_move_iterator(stack->end() - count), std::make_move_iterator(stack->end()));
  stack->resize(stack->size() - count);
  return arguments;
}

std::optional<c10::Device> npu_among(const Stack& arguments) {
  std::optional<c10::Device> found;
  for (const c10::IValue& argument : arguments) {
    if (argument.isDevice() && argument.toDevice().type() == c10::DeviceType::PrivateUse1) {
      found = argument.toDevice();
    }
    each_tensor(argument, [&](const at::Tensor& tensor) {
      if (!found && is_on_npu(tensor)) found = tensor.device();
    });
  }
  return found;
}

c10::Device device_of(const Stack& arguments) {
  const std::optional<c10::Device> found = npu_among(arguments);
  if (found && found->has_index()) return *found;
  return c10::Device(c10::DeviceType::PrivateUse1, current_device());
}

// CANN's matrix products take matrices of two types and compute in the wider one, PyTorch's refuse them.
Stack of_one_type(const Stack& arguments) {
  std::optional<c10::ScalarType> type;
  auto widen = [&](const at::Tensor& tensor) {
    type = type ? c10::promoteTypes(*type, tensor.scalar_type()) : tensor.scalar_type();
  };
  for (const c10::IValue& argument : arguments) each_tensor(argument, widen);
  auto converted = [&](const at::Tensor& tensor) { return tensor.defined() ? tensor.to(*type) : tensor; };
  Stack changed;
  for (const c10::IValue& argument : arguments) changed.push_back(map_tensors(argument, converted));
  return changed;
}

// The CPU's kernels would not mind tensors of another device, but a device does. Numbers that are only read
// may be on the host.
void expect_one_device(const Signature& signature, const Stack& arguments, c10::Device device) {
  auto expect = [&](const at::Tensor& tensor, bool may_be_on_host) {
    const bool on_host = tensor.device().type() == c10::DeviceType::CPU;
    TORCH_CHECK(
        tensor.device() == device || (on_host && may_be_on_host),
        "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ",
        tensor.device(), "! (", signature.name, ")");
  };
  for (const c10::IValue& argument : arguments) {
    each_tensor(argument, [&](const at::Tensor& tensor) {
      expect(tensor, tensor.dim() == 0 || signature.takes_host_indices);
    });
  }
  auto expect_on_device = [&](const at::Tensor& tensor) { expect(tensor, false); };
  for (size_t index : signature.out_arguments) each_tensor(arguments[index], expect_on_device);
  for (size_t index : signature.other_written_arguments) each_tensor(arguments[index], expect_on_device);
}

// A host tensor may change as soon as the call is over; a device reads it before.
at::Tensor host_argument(const at::Tensor& tensor) {
  if (is_on_npu(tensor)) return host_view(tensor);
  if (!tensor.defined()) return tensor;
  // Numbers are copied too: the last owner of a tensor that Python knows must not be a stream, which then would
  // wait for the interpreter's lock.
  const at::Tensor copy = tensor.clone();
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) copy.unsafeGetTensorImpl()->set_wrapped_number(true);
  return copy;
}

at::Tensor empty_on(c10::Device device, const Outline& outline) {
  if (!outline.defined) return at::Tensor();
  const auto options = at::TensorOptions().dtype(outline.type).device(device);
  return at::empty_strided(outline.sizes, outline.strides, options);
}

c10::IValue tensor_or_list(const std::vector<at::Tensor>& tensors, bool is_list) {
  return is_list ? c10::IValue(c10::List<at::Tensor>(tensors)) : c10::IValue(tensors[0]);
}

void copy_result(const at::Tensor& to, const at::Tensor& from) {
  if (!to.defined() || !from.defined()) return;
  TORCH_CHECK(
      to.sizes() == from.sizes(),
      "its result has sizes ", from.sizes(), " and its Meta kernel had announced ", to.sizes());
  to.copy_(from);
}

// An operator with everything that it needs, on its way to the stream. It may run more than once, in a graph,
// and always on the memory that it was given first; it holds no device tensor.
struct Work {
  c10::OperatorHandle op;
  Stack arguments;
  std::optional<size_t> generator_argument;
  std::optional<RandomNumbers> random_numbers;
  std::vector<std::vector<at::Tensor>> results = {};  // host views, for each return; none for a written argument

  void operator()() const {
    const c10::InferenceMode no_autograd;
    Stack stack;
    stack.reserve(arguments.size());
    for (const c10::IValue& argument : arguments) stack.push_back(map_tensors(argument, same_memory));
    if (random_numbers) stack[*generator_argument] = random_numbers->generator();
    op.callBoxed(&stack);
    for (size_t i = 0; i < results.size(); ++i) {
      if (results[i].empty()) continue;
      const std::vector<at::Tensor> made = tensors_in(stack[i]);
      TORCH_CHECK(made.size() == results[i].size(), "it made other results than its Meta kernel announced");
      for (size_t j = 0; j < made.size(); ++j) copy_result(results[i][j], made[j]);
    }
  }
};

// What an operator has made on the host becomes a tensor's value, in stream order.
void copy_to_device(const std::string& name, const at::Tensor& to, const at::Tensor& from) {
  launch(name + " result", [to = host_view(to), from] {
    const c10::InferenceMode no_autograd;
    copy_result(to, from);
  });
}

}  // namespace

KernelCounts& kernel_counts() {
  static KernelCounts counts;
  return counts;
}

void AtenOperator::operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  Stack arguments = pop_arguments(stack, signature_.arguments);
  if (signature_.multiplies_matrices) arguments = of_one_type(arguments);
  const c10::Device device = device_of(arguments);
  const c10::OptionalDeviceGuard guard(device);
  expect_one_device(signature_, arguments, device);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;

  std::shared_ptr<const Outcome> outcome;
  if (signature_.returns_tensors) outcome = shapes_.outcome_of(op, signature_, arguments);
  if (outcome) {
    enqueue(op, arguments, *outcome, stack);
  } else {
    run_and_wait(op, arguments, stack);
  }
}

Stack AtenOperator::host_arguments(const Stack& arguments) const {
  Stack changed;
  changed.reserve(arguments.size());
  for (const c10::IValue& argument : arguments) {
    if (argument.isDevice()) {
      changed.emplace_back(c10::Device(c10::DeviceType::CPU));
    } else {
      changed.push_back(map_tensors(argument, host_argument));
    }
  }
  return changed;
}

std::optional<RandomNumbers> AtenOperator::random_numbers(const Stack& arguments) const {
  if (!signature_.generator_argument) return std::nullopt;
  return RandomNumbers::take(arguments[*signature_.generator_argument].toOptional<at::Generator>());
}

void AtenOperator::enqueue(
    const c10::OperatorHandle& op, const Stack& arguments, const Outcome& outcome, Stack* stack) const {
  const c10::Device device(c10::DeviceType::PrivateUse1, current_device());
  for (size_t i = 0; i < signature_.out_arguments.size(); ++i) {
    const at::Tensor& out = arguments[signature_.out_arguments[i]].toTensor();
    if (out.sizes() != c10::IntArrayRef(outcome.out_sizes[i])) out.resize_(outcome.out_sizes[i]);
  }
  auto work = std::make_shared<Work>(
      Work{op, host_arguments(arguments), signature_.generator_argument, random_numbers(arguments)});
  for (size_t i = 0; i < outcome.returned.size(); ++i) {
    work->results.emplace_back();
    if (signature_.written_argument[i] >= 0) {
      stack->push_back(arguments[signature_.written_argument[i]]);
      continue;
    }
    std::vector<at::Tensor> fresh;
    for (const Outline& outline : outcome.returned[i]) {
      fresh.push_back(empty_on(device, outline));
      work->results.back().push_back(host_view(fresh.back()));
    }
    stack->push_back(tensor_or_list(fresh, outcome.is_list[i]));
  }
  kernel_counts().enqueued++;
  launch(signature_.name, [work] { (*work)(); });
}

// For what must be known on the host, as a number or a size that depends on values; and for operators without
// a Meta kernel.
void AtenOperator::run_and_wait(const c10::OperatorHandle& op, const Stack& arguments, Stack* stack) {
  TORCH_CHECK(
      !is_capturing(), "simulated Ascend: ", signature_.name,
      " cannot be captured in a graph: what it returns depends on values, or it has no Meta kernel, so the host ",
      "would have to wait for the stream, which CANN refuses with ACL_ERROR_RT_STREAM_CAPTURED (107027)");
  Stack given = host_arguments(arguments);
  for (size_t index : signature_.out_arguments) {  // in memory of its own, because the kernel may resize it
    const at::Tensor& out = arguments[index].toTensor();
    given[index] = at::Tensor(at::detail::empty_cpu(out.sizes(), out.scalar_type()));
  }
  kernel_counts().synchronous++;
  synchronous_calls_++;
  auto made = std::make_shared<Stack>(given);
  if (const auto numbers = random_numbers(arguments)) {
    (*made)[*signature_.generator_argument] = numbers->generator();
  }
  launch_and_wait(signature_.name, [op, made] {
    const c10::InferenceMode no_autograd;
    op.callBoxed(made.get());
  });

  for (size_t index : signature_.out_arguments) {
    const at::Tensor &out = arguments[index].toTensor(), &written = given[index].toTensor();
    if (out.sizes() != written.sizes()) out.resize_(written.sizes());
    copy_to_device(signature_.name, out, written);
  }
  auto move_to_device = [&](const at::Tensor& made) {
    const c10::Device device(c10::DeviceType::PrivateUse1, current_device());
    const at::Tensor moved = empty_on(device, outline_of(made));
    copy_to_device(signature_.name, moved, made);
    return moved;
  };
  for (size_t i = 0; i < made->size(); ++i) {
    const int written = signature_.written_argument[i];
    stack->push_back(written >= 0 ? arguments[written] : map_tensors((*made)[i], move_to_device));
  }
}

}  // namespace ascend_sim
