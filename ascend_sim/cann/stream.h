// A stream: a thread that runs tasks in the order in which they were put in.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "sim.h"

namespace sim {

// What the listing shows of a task.
struct TaskSummary {
  std::uint64_t number;
  std::string name;
  Partners partners;
  std::shared_ptr<const std::vector<Contained>> contains;
};

struct StreamSummary {
  int id, device;
  int graph;  // whose stream it is, by its number; 0: it is of the program
  std::vector<TaskSummary> queued;
  std::optional<TaskSummary> running;
  std::uint64_t ended;  // how many tasks have run to their end
  aclError error;       // what the stream failed with, or ACL_SUCCESS
};

class Stream : public std::enable_shared_from_this<Stream> {
 public:
  static std::shared_ptr<Stream> create(int device, int graph = 0);
  static std::shared_ptr<Stream> find(aclrtStream handle);  // aborts when there is none
  static std::vector<std::shared_ptr<Stream>> all();
  static Stream* of_this_thread();  // whose worker calls; nullptr for a host thread

  Stream(int id, int device, int graph) : id(id), device(device), graph(graph) {}

  std::uint64_t put(Task task);

  // Returns when the task of that number, and so all before it, has ended: ACL_SUCCESS. Or the error that the
  // stream failed with, or ACL_ERROR_RT_STREAM_SYNC_TIMEOUT.
  aclError wait_for(std::uint64_t task, const std::string& why,
                    std::optional<std::chrono::milliseconds> limit = {});
  aclError wait_for_all(std::optional<std::chrono::milliseconds> limit = {});

  std::uint64_t last_put() const;  // its number, 0 before there is any
  bool has_ended(std::uint64_t task) const;
  bool is_idle() const;
  bool is_destroyed() const { return destroyed_; }
  aclError error() const;

  void fail(aclError error);
  void destroy();  // what is queued never runs
  void wake();     // whoever waits here looks round: the process may be ending

  // Whether a task runs now that does not wait for anything: it may use what the exit of the process takes
  // away.
  bool is_busy() const;

  StreamSummary summary() const;

  // How long its tasks have waited, those that have ended.
  std::uint64_t waited_ns() const;

  const int id, device;
  const int graph;  // whose stream it is, by its number; 0: it is of the program

 private:
  struct Queued {
    std::uint64_t number;
    Task task;
  };

  void work();
  bool take_next();
  void run_current();
  void end_current();
  bool has_to_stop() const;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Queued> queue_;
  std::optional<Queued> current_;
  std::uint64_t last_put_ = 0, last_ended_ = 0;  // numbers
  std::uint64_t ended_ = 0;                      // how many
  std::uint64_t waited_ns_ = 0;
  aclError error_ = ACL_SUCCESS;
  bool working_ = false;
  std::atomic<bool> destroyed_{false};
};

}  // namespace sim
