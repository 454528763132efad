// Memory that torch_npu's caching allocator takes back is poisoned, once nothing may use it that was launched
// before. When that is depends on the block:
//
// - An ordinary one: at its place on the stream that owns it, even if that stream is in a capture: the graph does
//   not own the block, and when it is replayed the block may be another tensor's.
// - One that was allocated and freed in one capture: in each replay, where it was freed.
// - One that was allocated in a capture and is freed later: behind everything that runs or is queued, and while no
//   replay runs. A replay may use it, on any stream, and the program need not keep a tensor for that. If the
//   allocator gives it out again in the meantime, the poison comes too late and is left out.
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

class BlocksOfGraphs {
 public:
  // Never freed: streams may still run while the process exits.
  static BlocksOfGraphs& all() {
    static auto* blocks = new BlocksOfGraphs;
    return *blocks;
  }

  void set_graph_of(std::int64_t address, int graph) {
    const std::lock_guard lock(mutex_);
    captured_in_[address] = graph;
  }

  // 0 when it was allocated in no capture.
  int take_graph_of(std::int64_t address) {
    const std::lock_guard lock(mutex_);
    const auto found = captured_in_.extract(address);
    return found.empty() ? 0 : found.mapped();
  }

  // A range to be poisoned later, by a number.
  std::int64_t add(const Range& range) {
    const std::lock_guard lock(mutex_);
    to_be_poisoned_.emplace(++ever_, range);
    return ever_;
  }

  void poison(std::int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = to_be_poisoned_.extract(number);
    if (!found.empty()) found.mapped().poison();
  }

  // It is in use again, or gone.
  void spare(const Range& range) {
    const std::lock_guard lock(mutex_);
    std::erase_if(to_be_poisoned_, [&](const auto& each) { return each.second.overlaps(range); });
  }

 private:
  std::mutex mutex_;
  std::unordered_map<std::int64_t, int> captured_in_;  // by address, blocks in use: their graphs, by number
  std::map<std::int64_t, Range> to_be_poisoned_;
  std::int64_t ever_ = 0;
};

sim::Task poison_task(std::function<void()> run) {
  sim::Task task{"poison", std::move(run)};
  task.auxiliary = true;
  return task;
}

void given_out(const TraceEntry& entry) {
  BlocksOfGraphs& blocks = BlocksOfGraphs::all();
  blocks.spare(range_of(entry));
  if (entry.action_ != TraceEntry::ALLOC) return;
  if (const int graph = sim::graph_captured_by(entry.stream_)) blocks.set_graph_of(entry.addr_, graph);
}

void poison_once(aclrtStream stream, const Range& range) {
  through_task_queue("poison", [stream, range] {
    sim::enqueue_past_capture(stream, poison_task([range] { range.poison(); }));
  });
}

void poison_in_every_replay(aclrtStream stream, const Range& range) {
  through_task_queue("poison", [stream, range] {
    sim::enqueue(stream, poison_task([range] { range.poison(); }));
  });
}

void poison_behind_all(const Range& range) {
  const std::int64_t number = BlocksOfGraphs::all().add(range);
  through_task_queue("poison", [number] {
    sim::enqueue_behind_all(poison_task([number] { BlocksOfGraphs::all().poison(number); }));
  });
}

void freed(const TraceEntry& entry) {
  const c10_npu::NPUGuard device(entry.device_);
  const int captured_in = BlocksOfGraphs::all().take_graph_of(entry.addr_);
  if (captured_in == 0) {
    poison_once(entry.stream_, range_of(entry));
  } else if (captured_in == sim::graph_captured_by(entry.stream_)) {
    poison_in_every_replay(entry.stream_, range_of(entry));
  } else {
    poison_behind_all(range_of(entry));
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
