#include "aten_signature.h"

#include <algorithm>

namespace ascend_sim {
namespace {

bool is_one_of(const c10::AliasInfo& written, const c10::Argument& argument) {
  const c10::AliasInfo* alias = argument.alias_info();
  return alias && alias->isWrite() && *alias == written;
}

int argument_that_is(const c10::Argument& returned, const c10::FunctionSchema& schema) {
  const c10::AliasInfo* alias = returned.alias_info();
  if (!alias || !alias->isWrite()) return -1;
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    if (is_one_of(*alias, schema.arguments()[i])) return int(i);
  }
  return -1;
}

bool is_indexing(const std::string& name) {
  const auto starts = {"aten::index.", "aten::index_put", "aten::_index_put_impl_", "aten::_unsafe_index"};
  auto begins_name = [&](const char* start) { return name.rfind(start, 0) == 0; };
  return std::any_of(starts.begin(), starts.end(), begins_name);
}

bool is_matrix_product(const std::string& name) {
  const auto products = {"aten::linear", "aten::matmul", "aten::mm", "aten::bmm"};
  return std::find(products.begin(), products.end(), name) != products.end();
}

bool is_tensor_or_list(const c10::Argument& returned) {
  const c10::TypePtr& type = returned.type();
  if (type->kind() == c10::TypeKind::ListType) {
    return type->castRaw<c10::ListType>()->getElementType()->kind() == c10::TypeKind::TensorType;
  }
  return type->kind() == c10::TypeKind::TensorType;
}

}  // namespace

Signature::Signature(const c10::FunctionSchema& schema)
    : name(c10::toString(schema.operator_name())),
      arguments(schema.arguments().size()),
      returns_tensors(true),
      takes_host_indices(is_indexing(name)),
      multiplies_matrices(is_matrix_product(name)) {
  for (size_t i = 0; i < arguments; ++i) {
    const c10::Argument& argument = schema.arguments()[i];
    const bool written = argument.alias_info() && argument.alias_info()->isWrite();
    if (argument.is_out() && argument.type()->kind() == c10::TypeKind::TensorType) {
      out_arguments.push_back(i);
    } else if (written) {
      other_written_arguments.push_back(i);
    }
    if (argument.name() == "generator") generator_argument = i;
  }
  for (const c10::Argument& returned : schema.returns()) {
    written_argument.push_back(argument_that_is(returned, schema));
    returns_tensors = returns_tensors && is_tensor_or_list(returned);
  }
}

}  // namespace ascend_sim
