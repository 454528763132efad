// Task groups: recorded tasks that can be replaced later, without another capture.
//
// An update is recorded as the group was, on a stream that does not capture; its tasks are not run, but each
// becomes a task of that stream, "task update", which replaces the recorded one when the stream gets there. In
// no order with replays: who needs one takes an event of the external kind.
#pragma once

#include <acl/acl_rt.h>

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "graph.h"
#include "sim.h"
#include "stream.h"

namespace sim {

class TaskGroup {
 public:
  explicit TaskGroup(int graph) : graph(graph) {}

  void add(std::shared_ptr<Node> node) { nodes_.push_back(std::move(node)); }
  const std::vector<std::shared_ptr<Node>>& nodes() const { return nodes_; }

  // A task that is not an operator was to be added.
  void spoil(const std::string& task) { spoilt_by_ = task; }
  const std::string& spoilt_by() const { return spoilt_by_; }

  const int graph;  // the number of its graph

 private:
  std::string spoilt_by_;
  std::vector<std::shared_ptr<Node>> nodes_;
};

aclError begin_task_update(const Stream& stream, aclrtTaskGrp handle);
aclError end_task_update(const std::shared_ptr<Stream>& stream);

// Whether the stream is in an update; then the task is part of it.
bool take_for_update(const Stream& stream, Task& task);

// The handle by which the program knows a group. It is good as long as the graph exists.
aclrtTaskGrp publish(std::shared_ptr<TaskGroup> group);
void forget_groups_of(int graph);

}  // namespace sim
