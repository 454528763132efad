// Freed memory.
#pragma once

namespace ascend_sim {

// From now on: memory that torch_npu's caching allocator takes back is overwritten with 0xff: NaN, or -1.
void poison_freed_blocks();

}  // namespace ascend_sim
