// An aten operator on the simulated device: PyTorch's own CPU kernel, run by the stream's thread on device
// memory.
#pragma once

#include "aten_shapes.h"
#include "aten_signature.h"
#include "aten_stream.h"

#include <ATen/core/boxing/OperatorKernel.h>

#include <atomic>
#include <memory>
#include <optional>

namespace ascend_sim {

struct KernelCounts {
  std::atomic<long> enqueued{0}, synchronous{0};
};
KernelCounts& kernel_counts();

class AtenOperator final : public c10::OperatorKernel {
 public:
  explicit AtenOperator(const c10::FunctionSchema& schema) : signature_(schema) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack);

  const Signature& signature() const { return signature_; }
  long synchronous_calls() const { return synchronous_calls_; }

 private:
  using Stack = torch::jit::Stack;

  // These put the results on `stack`.
  void enqueue(const c10::OperatorHandle&, const Stack& arguments, const Outcome&, Stack* stack) const;
  void run_and_wait(const c10::OperatorHandle&, const Stack& arguments, Stack* stack);

  Stack host_arguments(const Stack& arguments) const;
  std::optional<RandomNumbers> random_numbers(const Stack& arguments) const;

  const Signature signature_;
  ShapeMemory shapes_;
  std::atomic<long> synchronous_calls_{0};
};

}  // namespace ascend_sim
