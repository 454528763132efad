#include "task_group.h"

#include <atomic>
#include <map>
#include <string>
#include <utility>

#include "refusal.h"

namespace sim {
namespace {

struct Update {
  std::shared_ptr<TaskGroup> group;
  std::vector<Task> tasks;
};

// Never freed: streams may still run while the process exits.
struct Groups {
  std::mutex mutex;
  std::map<aclrtTaskGrp, std::shared_ptr<TaskGroup>> by_handle;
  std::map<const Stream*, Update> updates;
  std::atomic<int> open{0};  // updates; looked at without the lock

  static Groups& all() {
    static auto* groups = new Groups;
    return *groups;
  }
};

std::string names_text(const std::vector<std::string>& names) {
  std::string text = std::to_string(names.size()) + (names.size() == 1 ? " task" : " tasks");
  for (std::size_t i = 0; i < names.size(); ++i) text += (i == 0 ? " (" : ", ") + names[i];
  return names.empty() ? text : text + ")";
}

std::vector<std::string> names_of(const std::vector<std::shared_ptr<Node>>& nodes) {
  std::vector<std::string> names;
  for (const auto& node : nodes) names.push_back(node->name);
  return names;
}

std::vector<std::string> names_of(const std::vector<Task>& tasks) {
  std::vector<std::string> names;
  for (const Task& task : tasks) names.push_back(task.name);
  return names;
}

}  // namespace

aclrtTaskGrp publish(std::shared_ptr<TaskGroup> group) {
  Groups& groups = Groups::all();
  const std::lock_guard lock(groups.mutex);
  const aclrtTaskGrp handle = group.get();
  groups.by_handle[handle] = std::move(group);
  return handle;
}

void forget_groups_of(int graph) {
  Groups& groups = Groups::all();
  const std::lock_guard lock(groups.mutex);
  std::erase_if(groups.by_handle, [&](const auto& each) { return each.second->graph == graph; });
}

aclError begin_task_update(const Stream& stream, aclrtTaskGrp handle) {
  Groups& groups = Groups::all();
  const std::lock_guard lock(groups.mutex);
  const auto found = groups.by_handle.find(handle);
  if (found == groups.by_handle.end()) {
    not_simulated("the update of a task group that does not exist, or no longer,");
  }
  const std::string call = "aclmdlRICaptureTaskUpdateBegin on stream " + std::to_string(stream.id);
  if (groups.updates.count(&stream) != 0) {
    return refuse(ERROR_CODE(ACL_ERROR_STREAM_TASK_GROUP_STATUS), call + " that is in an update already");
  }
  for (const auto& [other, update] : groups.updates) {
    if (update.group == found->second) {
      return refuse(ERROR_CODE(ACL_ERROR_STREAM_TASK_GROUP_STATUS),
                    call + " of a task group that stream " + std::to_string(other->id) + " updates");
    }
  }
  groups.updates[&stream] = {found->second, {}};
  ++groups.open;
  return ACL_SUCCESS;
}

bool take_for_update(const Stream& stream, Task& task) {
  Groups& groups = Groups::all();
  if (groups.open == 0) return false;
  const std::lock_guard lock(groups.mutex);
  const auto found = groups.updates.find(&stream);
  if (found == groups.updates.end()) return false;
  found->second.tasks.push_back(std::move(task));
  return true;
}

aclError end_task_update(const std::shared_ptr<Stream>& stream) {
  Update update;
  {
    Groups& groups = Groups::all();
    const std::lock_guard lock(groups.mutex);
    auto taken = groups.updates.extract(stream.get());
    if (taken.empty()) {
      return refuse(ERROR_CODE(ACL_ERROR_STREAM_TASK_GROUP_STATUS),
                    "aclmdlRICaptureTaskUpdateEnd on stream " + std::to_string(stream->id) +
                        " that is in no update");
    }
    --groups.open;
    update = std::move(taken.mapped());
  }
  const auto recorded = names_of(update.group->nodes()), given = names_of(update.tasks);
  if (recorded != given) {
    return refuse(ERROR_CODE(ACL_ERROR_RT_INTERNAL_ERROR),
                  "a task group of graph " + std::to_string(update.group->graph) + " has " +
                      names_text(recorded) + ", and its update has " + names_text(given));
  }
  for (std::size_t i = 0; i < given.size(); ++i) {
    stream->put({"task update", [node = update.group->nodes()[i], run = std::move(update.tasks[i].run)] {
                   node->replace(run);
                 }});
  }
  return ACL_SUCCESS;
}

}  // namespace sim
