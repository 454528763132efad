// What a kernel must know of an operator's schema, worked out once.
#pragma once

#include <ATen/core/function_schema.h>

#include <optional>
#include <string>
#include <vector>

namespace ascend_sim {

struct Signature {
  explicit Signature(const c10::FunctionSchema& schema);

  std::string name;  // "aten::add.Tensor"
  size_t arguments;
  std::vector<size_t> out_arguments;            // written, and resized to fit
  std::vector<size_t> other_written_arguments;  // as in add_
  std::vector<int> written_argument;            // for each return: which one it is, or -1 if it is fresh
  std::optional<size_t> generator_argument;
  bool returns_tensors;     // and nothing else
  bool takes_host_indices;  // as data[indices], where torch_npu copies indices to the device
  bool multiplies_matrices;  // which may be of two types, on CANN
};

}  // namespace ascend_sim
