// Fused attention, the operators whose lengths a captured graph can change.
#pragma once

#include <torch/library.h>

namespace ascend_sim {

// Gives npu_fused_infer_attention_score, its `.out`, its workspace and the shapes of its results a kernel.
// Returns how many operators that is.
int install_attention(torch::Library& npu_kernels);

}  // namespace ascend_sim
