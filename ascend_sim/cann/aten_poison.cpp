// Memory that torch_npu's caching allocator takes back is poisoned, once nothing may use it that was launched
// before. When that is depends on the block:
//
// - An ordinary one: at its place on the stream that owns it, even if that stream is in a capture: the graph does
//   not own the block, and when it is replayed the block may be another tensor's.
// - One that was allocated and freed in one capture: in each replay, where it was freed.
// - One that was allocated in a capture and is freed later: behind everything that runs or is queued. A replay may
//   use it, on any stream, and the program need not keep a tensor for that. If the allocator gives it out again
//   in the meantime, the poison comes too late and is left out.
#include "aten_poison.h"

#include "aten_stream.h"
#include "sim.h"

#include <torch_npu/csrc/core/npu/NPUCachingAllocator.h>
#include <torch_npu/csrc/core/npu/NPUGuard.h>
#include <torch_npu/csrc/core/npu/sys_ctrl/npu_sys_ctrl.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace ascend_sim {
namespace {

using c10_npu::NPUCachingAllocator::TraceEntry;

struct Range {
  std::int64_t address, bytes;

  bool overlaps(const Range& other) const {
    return address < other.address + other.bytes && other.address < address + bytes;
  }

  void poison() const { std::memset(reinterpret_cast<void*>(address), 0xff, bytes); }
};

Range range_of(const TraceEntry& entry) { return {entry.addr_, entry.size_}; }

// Never freed: streams may still run while the process exits.
struct BlocksOfGraphs {
  std::mutex mutex;
  std::unordered_map<std::int64_t, int> captured_in;  // by address, those in use: in which graph, by its number
  std::map<std::int64_t, Range> to_be_poisoned;       // by a number

  std::int64_t ever = 0;

  static BlocksOfGraphs& all() {
    static auto* blocks = new BlocksOfGraphs;
    return *blocks;
  }
};

sim::Task poison_task(std::function<void()> run) {
  sim::Task task{"poison", std::move(run)};
  task.auxiliary = true;
  return task;
}

void given_out(const TraceEntry& entry) {
  BlocksOfGraphs& blocks = BlocksOfGraphs::all();
  const std::lock_guard lock(blocks.mutex);
  const Range range = range_of(entry);
  std::erase_if(blocks.to_be_poisoned, [&](const auto& each) { return each.second.overlaps(range); });
  if (entry.action_ != TraceEntry::ALLOC) return;
  if (const int graph = sim::graph_captured_by(entry.stream_)) blocks.captured_in[entry.addr_] = graph;
}

void poison_behind_all(const Range& range) {
  BlocksOfGraphs& blocks = BlocksOfGraphs::all();
  const std::int64_t number = ++blocks.ever;
  blocks.to_be_poisoned.emplace(number, range);
  through_task_queue("poison", [number] {
    sim::enqueue_behind_all(poison_task([number] {
      BlocksOfGraphs& blocks = BlocksOfGraphs::all();
      const std::lock_guard lock(blocks.mutex);
      const auto found = blocks.to_be_poisoned.extract(number);
      if (!found.empty()) found.mapped().poison();
    }));
  });
}

void freed(const TraceEntry& entry) {
  const c10_npu::NPUGuard device(entry.device_);
  BlocksOfGraphs& blocks = BlocksOfGraphs::all();
  const std::lock_guard lock(blocks.mutex);
  const auto captured_in = blocks.captured_in.extract(entry.addr_);
  const Range range = range_of(entry);
  const aclrtStream stream = entry.stream_;
  if (captured_in.empty()) {
    through_task_queue("poison", [stream, range] {
      sim::enqueue_past_capture(stream, poison_task([range] { range.poison(); }));
    });
  } else if (captured_in.mapped() == sim::graph_captured_by(stream)) {
    through_task_queue("poison", [stream, range] {
      sim::enqueue(stream, poison_task([range] { range.poison(); }));
    });
  } else {
    poison_behind_all(range);
  }
}

// Called with the allocator's lock held, at the moment when a later allocation on the block's stream may get
// it: the poison goes behind everything launched so far and before everything that such an allocation can
// launch. torch_npu, too, puts tasks into its queue under this lock: event records (insert_events in
// NPUCachingAllocator.cpp).
void look_at(const TraceEntry& entry) {
  const bool streams_exist = c10_npu::NpuSysCtrl::GetInstance().GetInitFlag();  // not when the process ends
  if (!streams_exist) return;
  switch (entry.action_) {
    case TraceEntry::ALLOC:
    case TraceEntry::SEGMENT_FREE: return given_out(entry);
    case TraceEntry::FREE_COMPLETED: return freed(entry);
    default: return;
  }
}

}  // namespace

void poison_freed_blocks() {
  static std::once_flag once;
  std::call_once(once, [] { c10_npu::NPUCachingAllocator::attachAllocatorTraceTracker(look_at); });
}

}  // namespace ascend_sim
