// Whether the calling thread is between HcclGroupStart and HcclGroupEnd.
#pragma once

namespace sim::hccl {

bool in_group();

}  // namespace sim::hccl
