// Words of device memory that streams write and wait for. torch_npu makes its external events of them, which go
// between a graph and what is outside of it: recording one writes 1, waiting waits for 1 and writes 0. Other
// than with an ordinary event, who waits before it is recorded waits indeed.
#include <acl/acl_rt.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>

#include "sim.h"

namespace sim {
namespace {

// How long anyone waits here without looking round: a kernel, too, may write such a word.
constexpr std::chrono::milliseconds longest_sleep{20};

struct Condition {
  std::uint64_t value;
  std::uint32_t flag;

  bool holds(std::uint64_t word) const {
    switch (flag) {
      case ACL_STREAM_WAIT_VALUE_GEQ: return static_cast<std::int64_t>(word - value) >= 0;
      case ACL_STREAM_WAIT_VALUE_EQ: return word == value;
      case ACL_STREAM_WAIT_VALUE_AND: return (word & value) != 0;
      default: return ~(word | value) != 0;
    }
  }
};

// Never freed: streams may still run while the process exits.
struct Words {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<const void*, std::map<std::uint64_t, std::uint64_t>> queued;  // by task: what it will write
  std::map<const void*, std::set<std::uint64_t>> written_by_graphs;

  static Words& all() {
    static auto* words = new Words;
    return *words;
  }

  bool a_graph_writes(const void* address, const Condition& condition) const {
    const auto found = written_by_graphs.find(address);
    if (found == written_by_graphs.end()) return false;
    return std::any_of(found->second.begin(), found->second.end(),
                       [&](std::uint64_t value) { return condition.holds(value); });
  }

  // The latest queued task that will make it so.
  std::optional<std::uint64_t> task_for(const void* address, const Condition& condition) const {
    const auto found = queued.find(address);
    if (found == queued.end()) return std::nullopt;
    for (auto write = found->second.rbegin(); write != found->second.rend(); ++write) {
      if (condition.holds(write->second)) return write->first;
    }
    return std::nullopt;
  }
};

std::string text(const void* address) {
  return "the value at " + std::to_string(reinterpret_cast<std::uintptr_t>(address));
}

// Who has to write it: a queued task, or, when there is none, who calls aclrtValueWrite in this process.
void say_what_is_missing(std::optional<Waiting>& waiting, const void* address, const Condition& condition,
                         std::optional<std::uint64_t> task) {
  waiting.reset();
  if (task) {
    waiting.emplace(text(address) + ", to be written by task " + std::to_string(*task), *task);
  } else if (Words::all().a_graph_writes(address, condition)) {
    waiting.emplace(text(address) + ", which a graph writes");
  } else {
    waiting.emplace(text(address) + ", which no queued task writes",
                    Partners{text(address), "value write", {getpid()}});
  }
}

void wait_for_value(const std::uint64_t* address, const Condition& condition) {
  Words& words = Words::all();
  std::unique_lock lock(words.mutex);
  std::optional<Waiting> waiting;
  std::optional<std::uint64_t> said;
  while (!condition.holds(*address) && !shutting_down()) {
    const auto task = words.task_for(address, condition);
    if (!waiting || task != said) say_what_is_missing(waiting, address, condition, said = task);
    words.changed.wait_for(lock, longest_sleep);
  }
}

}  // namespace
}  // namespace sim

using sim::Words;

extern "C" {

aclError aclrtValueWrite(void* address, uint64_t value, uint32_t, aclrtStream stream) {
  Words& words = Words::all();
  const std::lock_guard lock(words.mutex);  // the task runs after this, and finds itself among the queued ones
  const auto number = std::make_shared<std::uint64_t>(0);
  *number = sim::enqueue(stream, {"value write", [address, value, number] {
                                    Words& words = Words::all();
                                    const std::lock_guard lock(words.mutex);
                                    *static_cast<uint64_t*>(address) = value;
                                    words.queued[address].erase(*number);
                                    words.changed.notify_all();
                                  }});
  if (*number == 0) {
    words.written_by_graphs[address].insert(value);
  } else {
    words.queued[address][*number] = value;
  }
  words.changed.notify_all();
  return ACL_SUCCESS;
}

aclError aclrtValueWait(void* address, uint64_t value, uint32_t flag, aclrtStream stream) {
  const sim::Condition condition{value, flag};
  sim::enqueue(stream, {"value wait", [address, condition] {
                          sim::wait_for_value(static_cast<uint64_t*>(address), condition);
                        }});
  return ACL_SUCCESS;
}

}  // extern "C"
