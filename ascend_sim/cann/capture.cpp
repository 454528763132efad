#include "capture.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "refusal.h"
#include "task_group.h"

namespace sim {
namespace {

// A stream that takes part, and what of it the end of the capture has to check.
struct Lane {
  std::shared_ptr<Stream> stream;
  std::size_t number;
  std::optional<std::size_t> ends_with_record = {};  // which one, if the last task is one
  std::shared_ptr<TaskGroup> group = {};             // that is open
};

struct Capture {
  std::shared_ptr<Graph> graph;
  aclmdlRICaptureMode mode;
  int thread;
  std::vector<Lane> lanes = {};  // the first one is that of the stream on which the capture began
  std::set<std::size_t> waited = {}, waited_by_first = {};  // records
  bool invalid = false;

  Lane* find(const Stream& stream) {
    for (Lane& lane : lanes) {
      if (lane.stream.get() == &stream) return &lane;
    }
    return nullptr;
  }

  Lane& join(std::shared_ptr<Stream> stream) {
    lanes.push_back({std::move(stream), graph->add_lane()});
    return lanes.back();
  }
};

// Never freed: streams may still run while the process exits.
struct Captures {
  std::mutex mutex;
  std::vector<std::unique_ptr<Capture>> list;
  std::atomic<int> count{0};  // looked at without the lock

  static Captures& all() {
    static auto* captures = new Captures;
    return *captures;
  }

  Capture* of(const Stream& stream) {
    for (const auto& capture : list) {
      if (capture->find(stream) != nullptr) return capture.get();
    }
    return nullptr;
  }

  Capture* with_graph(int number) {
    for (const auto& capture : list) {
      if (capture->graph->number == number) return capture.get();
    }
    return nullptr;
  }

  std::unique_ptr<Capture> take(const Capture* wanted) {
    const auto found =
        std::find_if(list.begin(), list.end(), [&](const auto& each) { return each.get() == wanted; });
    std::unique_ptr<Capture> taken = std::move(*found);
    list.erase(found);
    --count;
    return taken;
  }
};

thread_local aclmdlRICaptureMode mode_of_this_thread = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

std::string text(const Stream& stream) { return "stream " + std::to_string(stream.id); }
std::string text(const Graph& graph) { return "graph " + std::to_string(graph.number); }

std::string end_of(const Capture& capture) {
  return "aclmdlRICaptureEnd on " + text(*capture.lanes[0].stream) + ": ";
}

void add_to_group(TaskGroup& group, const std::shared_ptr<Node>& node, bool kernel) {
  if (kernel) {
    group.add(node);
  } else {
    group.spoil(node->name);
  }
}

aclError refuse_unjoined(const Capture& capture, const std::string& why) {
  return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_UNJOINED), end_of(capture) + why);
}

// All that other streams were given has to end before the last task of the first one.
aclError check_joined(const Capture& capture) {
  bool joined = capture.lanes.size() == 1;
  for (std::size_t i = 1; i < capture.lanes.size(); ++i) {
    const Lane& lane = capture.lanes[i];
    const std::string name = text(*lane.stream);
    if (!lane.ends_with_record) {
      return refuse_unjoined(capture, "the last task of " + name + " is not the record of an event");
    }
    if (capture.waited.count(*lane.ends_with_record) == 0) {
      return refuse_unjoined(capture, "no stream waits for the event that is the last task of " + name);
    }
    joined = joined || capture.waited_by_first.count(*lane.ends_with_record) != 0;
  }
  return joined ? ACL_SUCCESS : refuse_unjoined(capture, "it waits for none of the other streams");
}

aclError check_groups(const Capture& capture) {
  for (const Lane& lane : capture.lanes) {
    if (lane.group == nullptr) continue;
    return refuse(ERROR_CODE(ACL_ERROR_STREAM_TASK_GROUP_STATUS),
                  end_of(capture) + "a task group is open on " + text(*lane.stream));
  }
  return ACL_SUCCESS;
}

bool forbids(const Captures& captures, aclmdlRICaptureMode of_thread) {
  return std::any_of(captures.list.begin(), captures.list.end(), [&](const auto& capture) {
    const bool begun_here = capture->thread == gettid();
    switch (of_thread) {
      case ACL_MODEL_RI_CAPTURE_MODE_GLOBAL:
        return capture->mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL ||
               (begun_here && capture->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL);
      case ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL:
        return begun_here && capture->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED;
      default: return false;
    }
  });
}

}  // namespace

bool take_for_graph(const std::shared_ptr<Stream>& stream, Task& task) {
  Captures& captures = Captures::all();
  if (captures.count > 0) {
    const std::lock_guard lock(captures.mutex);
    if (Capture* capture = captures.of(*stream)) {
      Lane& lane = *capture->find(*stream);
      const bool of_program = !task.auxiliary, kernel = task.kernel;
      const auto node = capture->graph->add(lane.number, std::move(task));
      if (of_program) lane.ends_with_record.reset();
      if (of_program && lane.group != nullptr) add_to_group(*lane.group, node, kernel);
      return true;
    }
  }
  return !task.auxiliary && take_for_update(*stream, task);
}

aclError begin_capture(const std::shared_ptr<Stream>& stream, aclmdlRICaptureMode mode) {
  Captures& captures = Captures::all();
  const std::lock_guard lock(captures.mutex);
  if (captures.of(*stream) != nullptr) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_CAPTURED),
                  "aclmdlRICaptureBegin on " + text(*stream) + ", which is in a capture already");
  }
  auto capture =
      std::make_unique<Capture>(Capture{std::make_shared<Graph>(stream->device), mode, gettid()});
  capture->join(stream);
  captures.list.push_back(std::move(capture));
  ++captures.count;
  return ACL_SUCCESS;
}

aclError end_capture(const std::shared_ptr<Stream>& stream, std::shared_ptr<Graph>* graph) {
  Captures& captures = Captures::all();
  const std::lock_guard lock(captures.mutex);
  Capture* capture = captures.of(*stream);
  const std::string call = "aclmdlRICaptureEnd on " + text(*stream);
  if (capture == nullptr) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_NOT_CAPTURED), call + ", which is in no capture");
  }
  if (capture->find(*stream) != &capture->lanes[0]) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED),
                  call + ", although the capture began on " + text(*capture->lanes[0].stream));
  }
  const auto ended = captures.take(capture);
  if (ended->mode != ACL_MODEL_RI_CAPTURE_MODE_RELAXED && ended->thread != gettid()) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD),
                  call + " in another thread than that in which it began");
  }
  if (ended->invalid) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_CAPTURE_INVALIDATED),
                  call + ": an error has made the capture invalid");
  }
  if (const aclError error = check_groups(*ended); error != ACL_SUCCESS) return error;
  if (const aclError error = check_joined(*ended); error != ACL_SUCCESS) return error;
  *graph = ended->graph;
  return ACL_SUCCESS;
}

aclmdlRICaptureStatus capture_status(const Stream& stream, aclmdlRI* graph) {
  Captures& captures = Captures::all();
  *graph = nullptr;
  if (captures.count == 0) return ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  const std::lock_guard lock(captures.mutex);
  const Capture* capture = captures.of(stream);
  if (capture == nullptr) return ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  *graph = capture->graph.get();
  return capture->invalid ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
}

aclmdlRICaptureMode exchange_mode(aclmdlRICaptureMode mode) {
  return std::exchange(mode_of_this_thread, mode);
}

aclError begin_task_group(const Stream& stream) {
  Captures& captures = Captures::all();
  const std::lock_guard lock(captures.mutex);
  Capture* capture = captures.of(stream);
  const std::string call = "aclmdlRICaptureTaskGrpBegin on " + text(stream);
  if (capture == nullptr) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_NOT_CAPTURED), call + ", which is in no capture");
  }
  Lane& lane = *capture->find(stream);
  if (lane.group != nullptr) {
    return refuse(ERROR_CODE(ACL_ERROR_STREAM_TASK_GROUP_STATUS), call + ", which has one that is open");
  }
  lane.group = std::make_shared<TaskGroup>(capture->graph->number);
  return ACL_SUCCESS;
}

aclError end_task_group(const Stream& stream, std::shared_ptr<TaskGroup>* group) {
  Captures& captures = Captures::all();
  const std::lock_guard lock(captures.mutex);
  Capture* capture = captures.of(stream);
  const std::string call = "aclmdlRICaptureTaskGrpEnd on " + text(stream);
  if (capture == nullptr) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_NOT_CAPTURED), call + ", which is in no capture");
  }
  Lane& lane = *capture->find(stream);
  if (lane.group == nullptr) {
    return refuse(ERROR_CODE(ACL_ERROR_STREAM_TASK_GROUP_STATUS), call + ", which has none that is open");
  }
  *group = std::exchange(lane.group, nullptr);
  if ((*group)->spoilt_by().empty()) return ACL_SUCCESS;
  return refuse(ERROR_CODE(ACL_ERROR_RT_TASK_TYPE_NOT_SUPPORT),
                call + ": only operators may be in a task group, and " + (*group)->spoilt_by() + " is none");
}

std::optional<CapturedRecord> capture_record(const Stream& stream, int event) {
  Captures& captures = Captures::all();
  if (captures.count == 0) return std::nullopt;
  const std::lock_guard lock(captures.mutex);
  Capture* capture = captures.of(stream);
  if (capture == nullptr) return std::nullopt;
  Lane& lane = *capture->find(stream);
  lane.ends_with_record = capture->graph->add_record(lane.number, event);
  return CapturedRecord{capture->graph->number, *lane.ends_with_record};
}

bool is_being_captured(const CapturedRecord& record) {
  Captures& captures = Captures::all();
  if (captures.count == 0) return false;
  const std::lock_guard lock(captures.mutex);
  return captures.with_graph(record.graph) != nullptr;
}

aclError capture_wait(const std::shared_ptr<Stream>& stream, const CapturedRecord& record) {
  Captures& captures = Captures::all();
  const std::lock_guard lock(captures.mutex);
  Capture* capture = captures.with_graph(record.graph);
  if (capture == nullptr) return ACL_SUCCESS;  // it has ended in the meantime
  Capture* other = captures.of(*stream);
  if (other != nullptr && other != capture) {
    capture->invalid = other->invalid = true;
    return refuse(ERROR_CODE(ACL_ERROR_STREAM_CAPTURE_CONFLICT),
                  "aclrtStreamWaitEvent on " + text(*stream) + ", which captures " + text(*other->graph) +
                      ", of an event that was recorded in " + text(*capture->graph));
  }
  Lane& lane = other == nullptr ? capture->join(stream) : *capture->find(*stream);
  capture->graph->add_wait(lane.number, record.record);
  lane.ends_with_record.reset();
  capture->waited.insert(record.record);
  if (lane.number == 0) capture->waited_by_first.insert(record.record);
  return ACL_SUCCESS;
}

bool is_capturing(const Stream& stream) {
  Captures& captures = Captures::all();
  if (captures.count == 0) return false;
  const std::lock_guard lock(captures.mutex);
  return captures.of(stream) != nullptr;
}

aclError refuse_if_capturing(const Stream& stream, const char* call) {
  if (!is_capturing(stream)) return ACL_SUCCESS;
  return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_CAPTURED),
                std::string(call) + " of " + text(stream) + ", which is in a capture");
}

aclError refuse_if_device_captures(int device, const char* call) {
  Captures& captures = Captures::all();
  if (captures.count == 0) return ACL_SUCCESS;
  const std::lock_guard lock(captures.mutex);
  for (const auto& capture : captures.list) {
    if (capture->graph->device != device) continue;
    return refuse(ERROR_CODE(ACL_ERROR_RT_STREAM_CAPTURED),
                  std::string(call) + " of device " + std::to_string(device) + " while " +
                      text(*capture->lanes[0].stream) + " is in a capture");
  }
  return ACL_SUCCESS;
}

aclError refuse_by_mode(const char* call, bool asynchronous) {
  Captures& captures = Captures::all();
  if (captures.count == 0) return ACL_SUCCESS;
  const std::lock_guard lock(captures.mutex);
  if (!forbids(captures, mode_of_this_thread)) return ACL_SUCCESS;
  const std::string during = std::string(call) + " during a capture";
  if (!asynchronous) return refuse(ERROR_CODE(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT), during);
  return refuse(ERROR_CODE(ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC),
                during + ", of memory that is not pinned, would be a copy at once");
}

}  // namespace sim
