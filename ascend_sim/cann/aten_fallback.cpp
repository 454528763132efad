// libascend_sim_kernels.so: gives the aten operators of the simulated device a kernel each, in place of
// torch_npu's, which would call CANN's operator library. What allocates, makes views and copies stays
// torch_npu's.
#include "aten_attention.h"
#include "aten_operator.h"
#include "aten_poison.h"
#include "aten_stream.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <string>
#include <unordered_set>
#include <vector>

namespace ascend_sim {
namespace {

using c10::DispatchKey;
using torch::CppFunction;

const std::unordered_set<std::string> kept_from_torch_npu = {
    // allocation
    "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_pin_memory", "pin_memory",
    "is_pinned",
    // views, and what moves a tensor to other storage
    "as_strided", "view", "_reshape_alias", "unfold", "detach", "alias", "contiguous", "resize_",
    "resize_as_", "_resize_output_", "set_", "is_set_to", "lift", "lift_fresh", "_lazy_clone",
    // copies; and what a copy is made of
    "copy_", "_copy_from", "_copy_from_and_resize", "_to_copy", "to", "zero_", "_local_scalar_dense",
    // streams
    "record_stream",
};

const std::unordered_set<std::string> written_here = {"native_dropout", "scaled_dot_product_attention"};

const DispatchKey composite_keys[] = {
    DispatchKey::CompositeImplicitAutograd,
    DispatchKey::CompositeExplicitAutograd,
    DispatchKey::CompositeExplicitAutogradNonFunctional,
};

std::vector<AtenOperator*>& installed_operators() {
  static std::vector<AtenOperator*> operators;  // they belong to the dispatcher
  return operators;
}

std::optional<DispatchKey> composite_key_of(const c10::OperatorHandle& op) {
  for (DispatchKey key : composite_keys) {
    if (op.hasKernelForDispatchKey(key)) return key;
  }
  return std::nullopt;
}

bool returns_view(const c10::FunctionSchema& schema) {
  for (const c10::Argument& returned : schema.returns()) {
    if (returned.alias_info() && !returned.alias_info()->isWrite()) return true;
  }
  return false;
}

// PyTorch brings a kernel for the CPU, or one made of other operators that torch_npu has replaced by its own.
bool has_kernel_to_run(const c10::OperatorHandle& op) {
  if (op.hasKernelForDispatchKey(DispatchKey::CPU)) return true;
  return op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) && composite_key_of(op).has_value();
}

bool draws_random_numbers_without_saying_whose(const c10::OperatorHandle& op) {
  if (!op.hasTag(at::Tag::nondeterministic_seeded)) return false;
  for (const c10::Argument& argument : op.schema().arguments()) {
    if (argument.name() == "generator") return false;
  }
  return true;
}

// PyTorch's composite kernel, on the device: the operators that it is made of come back here, one by one.
template <DispatchKey key>
void call_composite(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  op.callBoxedForDispatchKey(key, *stack);
}

void refuse_random_numbers(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "simulated Ascend: ", op.operator_name(),
      " draws random numbers without a generator, which is not simulated");
}

CppFunction random_kernel(const c10::OperatorHandle& op) {
  switch (composite_key_of(op).value_or(DispatchKey::Undefined)) {
    case DispatchKey::CompositeImplicitAutograd:
      return CppFunction::makeFromBoxedFunction<&call_composite<DispatchKey::CompositeImplicitAutograd>>();
    case DispatchKey::CompositeExplicitAutograd:
      return CppFunction::makeFromBoxedFunction<&call_composite<DispatchKey::CompositeExplicitAutograd>>();
    default:
      return CppFunction::makeFromBoxedFunction<&refuse_random_numbers>();
  }
}

CppFunction kernel_for(const c10::OperatorHandle& op) {
  if (draws_random_numbers_without_saying_whose(op)) return random_kernel(op);
  auto kernel = std::make_unique<AtenOperator>(op.schema());
  installed_operators().push_back(kernel.get());
  return CppFunction::makeFromBoxedFunctor(std::move(kernel));
}

// torch_npu differentiates some operators itself, and then calls CANN past the dispatcher. Here it is done as
// PyTorch does it, and without gradients the operator comes straight to its kernel.
template <DispatchKey key>
void differentiate(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (c10::GradMode::is_enabled()) return op.callBoxedForDispatchKey(key, *stack);
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

CppFunction autograd_kernel_for(const c10::OperatorHandle& op) {
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
    return CppFunction::makeFromBoxedFunction<&differentiate<DispatchKey::CompositeImplicitAutograd>>();
  }
  if (op.hasKernelForDispatchKey(DispatchKey::Autograd)) {
    return CppFunction::makeFromBoxedFunction<&differentiate<DispatchKey::Autograd>>();
  }
  return CppFunction::makeFallthrough();
}

// torch_npu sends it to a fused kernel of CANN.
at::Tensor scaled_dot_product_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const std::optional<at::Tensor>& mask, double dropout, bool is_causal, std::optional<double> scale,
    bool enable_gqa) {
  return std::get<0>(at::_scaled_dot_product_attention_math(
      query, key, value, mask, dropout, is_causal, /*dropout_mask=*/std::nullopt, scale, enable_gqa));
}

// The CPU's kernel takes the process's own random numbers, not the device's.
std::tuple<at::Tensor, at::Tensor> native_dropout(
    const at::Tensor& input, double probability, std::optional<bool> train) {
  const double kept = train.value_or(true) ? 1 - probability : 1;
  const at::Tensor mask = at::empty_like(input, input.options().dtype(at::kBool)).bernoulli_(kept);
  return {input.mul(mask).mul(kept > 0 ? 1 / kept : 0), mask};
}

// PyTorch warns of every kernel that replaces another one; that is what this library is for.
class NoWarnings final : public c10::WarningHandler {
 public:
  void process(const c10::Warning&) override {}
};

// Never freed: it stays with the process.
torch::Library& library_for(DispatchKey key, const char* name = "aten") {
  return *new torch::Library(torch::Library::IMPL, name, key, __FILE__, __LINE__);
}

bool needs_kernel(const c10::OperatorHandle& op) {
  const std::string& name = op.operator_name().name;
  const bool is_aten = name.rfind("aten::", 0) == 0;
  return is_aten && !kept_from_torch_npu.count(name.substr(6)) && !written_here.count(name.substr(6)) &&
         !returns_view(op.schema()) && !op.hasTag(at::Tag::inplace_view) && has_kernel_to_run(op);
}

int install() {
  NoWarnings no_warnings;
  const c10::WarningUtils::WarningHandlerGuard guard(&no_warnings);
  torch::Library& kernels = library_for(DispatchKey::PrivateUse1);
  torch::Library& autograd_kernels = library_for(DispatchKey::AutogradPrivateUse1);
  int installed = 0;
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || !needs_kernel(*op)) continue;
    if (op->hasKernelForDispatchKey(DispatchKey::AutogradPrivateUse1)) {
      autograd_kernels.impl(c10::toString(name).c_str(), autograd_kernel_for(*op));
    }
    kernels.impl(c10::toString(name).c_str(), kernel_for(*op));
    ++installed;
  }
  kernels.impl("native_dropout", &native_dropout);
  autograd_kernels.impl(
      "native_dropout", CppFunction::makeFromBoxedFunction<&differentiate<DispatchKey::Autograd>>());
  kernels.impl("scaled_dot_product_attention", &scaled_dot_product_attention);
  autograd_kernels.impl("scaled_dot_product_attention", &scaled_dot_product_attention);
  return installed + int(written_here.size()) + install_attention(library_for(DispatchKey::PrivateUse1, "npu"));
}

}  // namespace
}  // namespace ascend_sim

extern "C" {

// How many operators have got a kernel.
int ascend_sim_install_kernels() {
  static const int installed = ascend_sim::install();
  return installed;
}

void ascend_sim_kernel_counts(long* enqueued, long* synchronous) {
  *enqueued = ascend_sim::kernel_counts().enqueued;
  *synchronous = ascend_sim::kernel_counts().synchronous;
}

// Calls `report` with the name of every operator that has made the host wait, and how often.
void ascend_sim_synchronous_operators(void (*report)(const char* name, long calls)) {
  for (const ascend_sim::AtenOperator* op : ascend_sim::installed_operators()) {
    if (op->synchronous_calls()) report(op->signature().name.c_str(), op->synchronous_calls());
  }
}

// The caching allocator must be there already: torch.npu.init() has been called.
void ascend_sim_poison_freed_blocks() { ascend_sim::poison_freed_blocks(); }

}  // extern "C"
