// A graph: what a capture has recorded, and how it runs.
//
// A graph has streams of its own, one for each stream that took part in the capture. A replay is one task of
// the stream that it is given: it puts all recorded tasks on the graph's streams and waits for their end. So
// gates, delays, the history, the listing and a search for deadlocks see inside. As on a device, a recorded
// task has nothing but addresses, and two replays of one graph run one after the other.
#pragma once

#include <acl/acl_rt.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "sim.h"
#include "stream.h"

namespace sim {

// A recorded task. A task update may replace what it does, also while a replay runs that has not come to it.
class Node {
 public:
  Node(std::size_t lane, Task task);

  void run() const;
  void replace(std::function<void()> run);

  const std::size_t lane;  // of the streams of the graph
  const std::string name;
  const Partners partners;

 private:
  mutable std::mutex mutex_;
  std::function<void()> run_;
};

// Calls something while no replay runs. A replay that comes in the meantime does not wait for that to happen, only
// for it to end.
void between_replays(const std::function<void()>& call);

class Graph : public std::enable_shared_from_this<Graph> {
 public:
  explicit Graph(int device);
  ~Graph();

  // ---- while it is captured ----

  std::size_t add_lane();
  std::shared_ptr<Node> add(std::size_t lane, Task task);
  std::size_t add_record(std::size_t lane, int event);  // returns what a wait has to name
  void add_wait(std::size_t lane, std::size_t record);

  // ---- afterwards ----

  // The task to be put on a stream.
  Task replay();

  // Whether a replay runs or is queued.
  bool is_in_use() const { return in_use_.use_count() > 1; }

  const int number, device;

 private:
  struct Entry {
    std::shared_ptr<Node> node;
    int event = -1;                          // of a record
    std::optional<std::size_t> waits_for{};  // the record of a wait
  };

  std::shared_ptr<const std::vector<Contained>> operations();
  void run();
  std::vector<std::uint64_t> put_all();
  Task task_of(const Entry& entry, const std::vector<std::uint64_t>& numbers) const;

  void put_and_wait();

  std::vector<Entry> entries_;  // in the order of their recording: a wait comes after its record
  std::vector<std::shared_ptr<Stream>> streams_;
  std::once_flag operations_found_;
  std::shared_ptr<const std::vector<Contained>> operations_;  // of HCCL
  std::mutex putting_;  // the tasks of two replays must not mix
  const std::shared_ptr<int> in_use_ = std::make_shared<int>();
};

}  // namespace sim
