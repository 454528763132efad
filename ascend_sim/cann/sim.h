// What the parts of the simulated CANN tell each other. Everything else is the public API of CANN, whose
// headers come with the torch_npu wheel.
//
// A device is memory of this process. A stream is a thread that runs tasks in the order they were put in. A
// task that waits (for an event, a peer, a gate) says so with a `Waiting`, and a host thread inside a
// blocking call does the same: that is what the listing shows, and what a deadlock is read from.
#pragma once

#include <acl/acl.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace sim {

// What an HCCL operation, queued or running, has to do with other processes. Empty for everything else.
struct Partners {
  std::string communicator;  // its name, equal on all members
  std::string operation;     // "send", "receive", "batch", "join", or the name of a collective
  std::vector<int> pids;     // who must do something before this can end
  int unknown = 0;           // how many more must: members that have not joined have no known pid yet
};

// A task inside another one: of a graph that is replayed.
struct Contained {
  std::string name;
  Partners partners;
};

struct Task {
  std::string name;  // "HcclSend", "memcpy D2H", "aten::add.Tensor", "event wait", ...
  std::function<void()> run;  // more than once if it is recorded in a graph
  Partners partners = {};
  std::shared_ptr<const std::vector<Contained>> contains = {};  // the HCCL operations of a replay
  bool kernel = false;     // an operator: nothing else may be in a task group
  bool auxiliary = false;  // of the simulator and not of the program: a capture need not join it
};

// Put a task at the end of a stream; nullptr is the default stream of the calling thread's device. Returns
// the number of the task, which no other task of this process has, and which is greater than those of all
// tasks before it. If the stream captures a graph, the task is recorded in it, does not run and has no number:
// 0.
std::uint64_t enqueue(aclrtStream stream, Task task);

// The same, and the task runs even if the stream captures.
std::uint64_t enqueue_past_capture(aclrtStream stream, Task task);

// Put a task behind all that is on any stream of the calling thread's device, and between replays, those that are
// launched later included. Only for the simulator's own.
void enqueue_behind_all(Task task);

// The graph that a stream captures, by its number; 0 when it captures none.
int graph_captured_by(aclrtStream stream);

// The calling thread, a stream's or the host's, stands still while one of these lives.
class Waiting {
 public:
  explicit Waiting(std::string reason, Partners partners = {});
  Waiting(std::string reason, std::uint64_t task);  // for a task of this process, by its number
  ~Waiting();
  Waiting(const Waiting&) = delete;

 private:
  const std::uint64_t number_;
  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
};

// What the calling thread has done since it began. A thread of a stream: how long its tasks took that have
// ended, waits included. Any thread: how long, and how often, it stood still in the simulator.
struct ThreadTimes {
  std::uint64_t tasks_ns = 0, waited_ns = 0, waits = 0;
};
ThreadTimes& times_of_this_thread();

// From inside a task: the stream runs nothing more and every synchronisation with it returns `error`.
void fail_stream(aclError error);

// Whether the thread that calls is one of a stream's, and that stream was destroyed or its process is ending.
bool shutting_down();

int current_device();
int stream_id(aclrtStream stream);

// An environment variable as a number; aborts with a sentence when it is not one.
long setting(const char* name, long otherwise);

// Speed of the links between devices (0 MB/s: no limit) and the size up to which a send needs no receiver. Set from the
// environment (ASCEND_SIM_LINK_US, ASCEND_SIM_LINK_MB_PER_S, ASCEND_SIM_EAGER_BYTES) and by the control
// socket.
struct Links {
  std::atomic<long> us_per_message, mb_per_s, eager_bytes;
};
Links& links();

// Print one line to stderr, and abort: something was called that is not simulated.
[[noreturn]] void not_simulated(const char* what);

}  // namespace sim
