// Who stands still in this process, and why.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sim.h"

namespace sim {

struct Wait {
  int thread;               // as the kernel numbers it
  std::string thread_name;  // "stream 3", "acl_thread" for that of torch_npu's task queue
  int stream;               // whose thread it is, or no_stream
  std::string reason;
  Partners partners;
  std::uint64_t task;  // that must end first, or 0
};

constexpr int no_stream = -1;

// In the order in which they began: of two of one thread, the later one is the inner one.
std::vector<Wait> all_waits();

}  // namespace sim
