// What the results of an operator look like, known before it runs: asked of its Meta kernel, and remembered,
// because many Meta kernels are Python and take 50 microseconds, and a model asks the same for every layer.
#pragma once

#include "aten_signature.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace ascend_sim {

// A tensor without memory.
struct Outline {
  bool defined;
  at::ScalarType type;
  std::vector<int64_t> sizes, strides;
};

Outline outline_of(const at::Tensor& tensor);

struct Outcome {
  std::vector<std::vector<Outline>> returned;   // for each return; none for a written argument
  std::vector<bool> is_list;                    // for each return
  std::vector<std::vector<int64_t>> out_sizes;  // for each of Signature::out_arguments, afterwards
};

class ShapeMemory {
 public:
  // Nothing if the operator has no Meta kernel, or if it cannot say: because that depends on values, or
  // because the arguments are wrong. The latter is for the CPU's kernel to report.
  std::shared_ptr<const Outcome> outcome_of(
      const c10::OperatorHandle& op, const Signature& signature, const torch::jit::Stack& arguments);

 private:
  std::mutex mutex_;
  std::unordered_map<std::string, std::shared_ptr<const Outcome>> remembered_;
};

}  // namespace ascend_sim
