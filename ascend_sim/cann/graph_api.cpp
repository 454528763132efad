// The functions aclmdlRI* of CANN: captures, graphs, task groups.
#include <acl/acl_rt.h>

#include <chrono>
#include <map>
#include <mutex>
#include <thread>

#include "capture.h"
#include "process.h"
#include "refusal.h"
#include "task_group.h"

namespace sim {
namespace {

// CANN waits so long for a replay before it refuses to destroy a graph.
constexpr std::chrono::seconds longest_replay{10};

// Those that the program holds. A replay keeps its graph alive. Never freed: streams may still run while the
// process exits.
struct Graphs {
  std::mutex mutex;
  std::map<aclmdlRI, std::shared_ptr<Graph>> by_handle;

  static Graphs& all() {
    static auto* graphs = new Graphs;
    return *graphs;
  }
};

std::shared_ptr<Graph> find_graph(aclmdlRI handle) {
  Graphs& graphs = Graphs::all();
  const std::lock_guard lock(graphs.mutex);
  const auto found = graphs.by_handle.find(handle);
  if (found == graphs.by_handle.end()) not_simulated("the use of a graph that does not exist, or no longer,");
  return found->second;
}

aclError wait_for_replays(const Graph& graph) {
  if (!graph.is_in_use()) return ACL_SUCCESS;
  const std::string call = "aclmdlRIDestroy of graph " + std::to_string(graph.number);
  const Waiting waiting(call + ": a replay has not ended");
  const auto deadline = std::chrono::steady_clock::now() + longest_replay;
  while (graph.is_in_use()) {
    if (std::chrono::steady_clock::now() > deadline || exit_takes_too_long()) {
      return refuse(ERROR_CODE(ACL_ERROR_RT_MODEL_RUNNING), call + ": a replay has not ended");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return ACL_SUCCESS;
}

}  // namespace
}  // namespace sim

using sim::Stream;

extern "C" {

// The default stream, which has no handle, captures nothing.
aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
  if (stream == nullptr) {
    return sim::refuse(ERROR_CODE(ACL_ERROR_RT_PARAM_INVALID), "aclmdlRICaptureBegin on the default stream");
  }
  return sim::begin_capture(Stream::find(stream), mode);
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status, aclmdlRI* handle) {
  aclmdlRI captured = nullptr;
  const auto found = sim::capture_status(*Stream::find(stream), &captured);
  if (status != nullptr) *status = found;
  if (handle != nullptr) *handle = captured;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* handle) {
  *handle = nullptr;
  std::shared_ptr<sim::Graph> graph;
  const aclError error = sim::end_capture(Stream::find(stream), &graph);
  if (error != ACL_SUCCESS) return error;
  *handle = graph.get();
  sim::Graphs& graphs = sim::Graphs::all();
  const std::lock_guard lock(graphs.mutex);
  graphs.by_handle[*handle] = std::move(graph);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  *mode = sim::exchange_mode(*mode);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
  const auto graph = sim::find_graph(handle);
  const aclError error = sim::refuse_if_capturing(*Stream::find(stream), "aclmdlRIExecuteAsync");
  if (error != ACL_SUCCESS) return error;
  sim::enqueue(stream, graph->replay());
  return ACL_SUCCESS;
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
  const auto graph = sim::find_graph(handle);
  if (const aclError error = sim::wait_for_replays(*graph); error != ACL_SUCCESS) return error;
  sim::Graphs& graphs = sim::Graphs::all();
  const std::lock_guard lock(graphs.mutex);
  graphs.by_handle.erase(handle);
  return ACL_SUCCESS;
}

// Of a graph, or of one that is being captured.
aclError aclmdlRIGetId(aclmdlRI handle, uint32_t* id) {
  *id = static_cast<sim::Graph*>(handle)->number;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
  return sim::begin_task_group(*Stream::find(stream));
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp* handle) {
  *handle = nullptr;
  std::shared_ptr<sim::TaskGroup> group;
  const aclError error = sim::end_task_group(*Stream::find(stream), &group);
  if (error == ACL_SUCCESS) *handle = sim::publish(std::move(group));
  return error;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream handle, aclrtTaskGrp group) {
  const auto stream = Stream::find(handle);
  const aclError error = sim::refuse_if_capturing(*stream, "aclmdlRICaptureTaskUpdateBegin");
  return error == ACL_SUCCESS ? sim::begin_task_update(*stream, group) : error;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream stream) {
  return sim::end_task_update(Stream::find(stream));
}

}  // extern "C"
