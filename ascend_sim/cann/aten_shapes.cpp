#include "aten_shapes.h"

#include "aten_tensors.h"
#include "aten_values.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/DefaultDtype.h>

namespace ascend_sim {
namespace {

using torch::jit::Stack;

constexpr size_t most_remembered = 1 << 12;  // an argument may be a number that is never the same

// A text that is equal for arguments which every Meta kernel answers alike.
class Question {
 public:
  explicit Question(const Stack& arguments) {
    text_.reserve(256);
    add(c10::get_default_dtype_as_scalartype());
    for (const c10::IValue& argument : arguments) add_value(argument);
  }

  // Nothing if there is a kind of argument that this does not know.
  const std::string* text() const { return complete_ ? &text_ : nullptr; }

 private:
  template <class Plain>
  void add(const Plain& plain) {
    text_.append(reinterpret_cast<const char*>(&plain), sizeof plain);
  }

  void add_numbers(c10::ArrayRef<int64_t> numbers) {
    add(numbers.size());
    text_.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int64_t));
  }

  void add_tensor(const at::Tensor& tensor) {
    add(tensor.defined());
    if (!tensor.defined()) return;
    add(tensor.scalar_type());
    add(tensor.unsafeGetTensorImpl()->is_wrapped_number());
    add_numbers(tensor.sizes());
    add_numbers(tensor.strides());
  }

  void add_value(const c10::IValue& value) {
    if (value.isTensor()) {
      add('t');
      add_tensor(value.toTensor());
    } else if (value.isNone() || value.isGenerator()) {
      add('n');
    } else if (value.isInt()) {
      add('i');
      add(value.toInt());
    } else if (value.isDouble()) {
      add('d');
      add(value.toDouble());
    } else if (value.isBool()) {
      add('b');
      add(value.toBool());
    } else if (value.isDevice()) {
      add('D');
    } else {
      add_composed(value);
    }
  }

  void add_composed(const c10::IValue& value) {
    if (value.isString()) {
      add('s');
      add(value.toStringRef().size());
      text_ += value.toStringRef();
    } else if (value.isComplexDouble()) {
      add('c');
      add(value.toComplexDouble());
    } else if (value.isIntList()) {
      add('I');
      add_numbers(value.toIntVector());
    } else if (value.isList()) {
      add('l');
      add(value.toListRef().size());
      for (const c10::IValue& element : value.toListRef()) add_value(element);
    } else {
      complete_ = false;
    }
  }

  std::string text_;
  bool complete_ = true;
};

Stack meta_arguments(const Stack& arguments) {
  Stack changed;
  changed.reserve(arguments.size());
  for (const c10::IValue& argument : arguments) {
    if (argument.isDevice()) {
      changed.emplace_back(c10::Device(c10::DeviceType::Meta));
    } else if (argument.isGenerator()) {
      changed.emplace_back();
    } else {
      changed.push_back(map_tensors(argument, meta_copy));
    }
  }
  return changed;
}

Outcome ask_meta_kernel(const c10::OperatorHandle& op, const Signature& signature, const Stack& arguments) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Stack given = meta_arguments(arguments);
  Stack returned = given;
  op.callBoxed(&returned);

  Outcome outcome;
  for (size_t i = 0; i < returned.size(); ++i) {
    outcome.returned.emplace_back();
    outcome.is_list.push_back(!returned[i].isTensor());
    if (signature.written_argument[i] >= 0) continue;
    for (const at::Tensor& tensor : tensors_in(returned[i])) {
      outcome.returned.back().push_back(outline_of(tensor));
    }
  }
  for (size_t index : signature.out_arguments) {
    outcome.out_sizes.push_back(given[index].toTensor().sizes().vec());
  }
  return outcome;
}

}  // namespace

Outline outline_of(const at::Tensor& tensor) {
  if (!tensor.defined()) return {false, at::ScalarType::Undefined, {}, {}};
  return {true, tensor.scalar_type(), tensor.sizes().vec(), tensor.strides().vec()};
}

std::shared_ptr<const Outcome> ShapeMemory::outcome_of(
    const c10::OperatorHandle& op, const Signature& signature, const Stack& arguments) {
  const Question question(arguments);
  if (question.text()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = remembered_.find(*question.text());
    if (found != remembered_.end()) return found->second;
  }
  std::shared_ptr<const Outcome> outcome;
  try {
    outcome = std::make_shared<const Outcome>(ask_meta_kernel(op, signature, arguments));
  } catch (const std::exception&) {
    return nullptr;
  }
  if (question.text()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (remembered_.size() >= most_remembered) remembered_.clear();
    remembered_.emplace(*question.text(), outcome);
  }
  return outcome;
}

}  // namespace ascend_sim
