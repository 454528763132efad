// Captures: streams whose tasks are recorded and not run.
//
// A capture begins on one stream. Another one joins it when it waits for an event that was recorded in the
// capture, and has to be joined back, by an event that the first one waits for in the end. What cannot be
// recorded is refused, with the error code of CANN.
#pragma once

#include <acl/acl_rt.h>

#include <cstddef>
#include <memory>
#include <optional>

#include "graph.h"
#include "sim.h"
#include "stream.h"

namespace sim {

class TaskGroup;

// Takes a task if its stream captures, or updates a task group (task_group.h). Nothing is left of it then.
bool take_for_graph(const std::shared_ptr<Stream>& stream, Task& task);

// ---- the API (graph_api.cpp) ----

aclError begin_capture(const std::shared_ptr<Stream>& stream, aclmdlRICaptureMode mode);
aclError end_capture(const std::shared_ptr<Stream>& stream, std::shared_ptr<Graph>* graph);
aclmdlRICaptureStatus capture_status(const Stream& stream, aclmdlRI* graph);
aclError begin_task_group(const Stream& stream);
aclError end_task_group(const Stream& stream, std::shared_ptr<TaskGroup>* group);

// The mode of this thread, which says what is refused in it while there are captures; returns the one before.
aclmdlRICaptureMode exchange_mode(aclmdlRICaptureMode mode);

// ---- events (event.cpp) ----

// A record that was made in a capture.
struct CapturedRecord {
  int graph;           // its number
  std::size_t record;  // for Graph::add_wait
};

// Nothing when the stream does not capture.
std::optional<CapturedRecord> capture_record(const Stream& stream, int event);

// Whether the capture of that record goes on.
bool is_being_captured(const CapturedRecord& record);

// The stream takes part in the capture from now on.
aclError capture_wait(const std::shared_ptr<Stream>& stream, const CapturedRecord& record);

// ---- what is refused: the error, or ACL_SUCCESS ----

bool is_capturing(const Stream& stream);
aclError refuse_if_capturing(const Stream& stream, const char* call);
aclError refuse_if_device_captures(int device, const char* call);

// Calls that touch memory at once, in no order with what streams do. A copy that was to be asynchronous has an
// error code of its own.
aclError refuse_by_mode(const char* call, bool asynchronous = false);

}  // namespace sim
