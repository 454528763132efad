#include "graph.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <utility>

#include "task_group.h"

namespace sim {
namespace {

std::atomic<int> graphs_ever{0};

std::string record_text(int event, std::uint64_t task, const Stream& stream) {
  return "event " + std::to_string(event) + ", recorded by task " + std::to_string(task) + " on stream " +
         std::to_string(stream.id);
}

// How long anyone waits here without looking round.
constexpr std::chrono::milliseconds longest_sleep{100};

// Never freed: streams may still run while the process exits.
struct Replays {
  std::mutex mutex;
  std::condition_variable none_runs;
  int running = 0;

  static Replays& all() {
    static auto* replays = new Replays;
    return *replays;
  }

  void begin() {
    const std::lock_guard lock(mutex);
    ++running;
  }

  void end() {
    const std::lock_guard lock(mutex);
    if (--running == 0) none_runs.notify_all();
  }
};

// Waits for another stream from inside a task. What that one failed with, this one fails with.
void wait_or_fail(Stream& stream, std::uint64_t task, const std::string& why) {
  const aclError error = stream.wait_for(task, why);
  if (error != ACL_SUCCESS) fail_stream(error);
}

}  // namespace

Node::Node(std::size_t lane, Task task)
    : lane(lane), name(std::move(task.name)), partners(std::move(task.partners)), run_(std::move(task.run)) {}

void Node::run() const {
  std::function<void()> run;
  {
    const std::lock_guard lock(mutex_);
    run = run_;
  }
  run();
}

void Node::replace(std::function<void()> run) {
  const std::lock_guard lock(mutex_);
  run_ = std::move(run);
}

Graph::Graph(int device) : number(++graphs_ever), device(device) {}

Graph::~Graph() {
  forget_groups_of(number);
  for (const auto& stream : streams_) stream->destroy();
}

std::size_t Graph::add_lane() {
  streams_.push_back(Stream::create(device, number));
  return streams_.size() - 1;
}

std::shared_ptr<Node> Graph::add(std::size_t lane, Task task) {
  entries_.push_back({std::make_shared<Node>(lane, std::move(task))});
  return entries_.back().node;
}

std::size_t Graph::add_record(std::size_t lane, int event) {
  add(lane, {"event record", [] {}});
  entries_.back().event = event;
  return entries_.size() - 1;
}

void Graph::add_wait(std::size_t lane, std::size_t record) {
  add(lane, {"event wait", [] {}});
  entries_.back().waits_for = record;
}

std::shared_ptr<const std::vector<Contained>> Graph::operations() {
  std::call_once(operations_found_, [this] {
    auto found = std::make_shared<std::vector<Contained>>();
    for (const Entry& entry : entries_) {
      const Node& node = *entry.node;
      if (!node.partners.communicator.empty()) found->push_back({node.name, node.partners});
    }
    operations_ = std::move(found);
  });
  return operations_;
}

Task Graph::replay() {
  Task task{"graph " + std::to_string(number) + " replay",
            [self = shared_from_this(), in_use = in_use_] { self->run(); }};
  task.contains = operations();
  return task;
}

void between_replays(const std::function<void()>& call) {
  Replays& replays = Replays::all();
  std::unique_lock lock(replays.mutex);
  std::optional<Waiting> waiting;
  while (replays.running > 0 && !shutting_down()) {
    if (!waiting) waiting.emplace("no replay may run");
    replays.none_runs.wait_for(lock, longest_sleep);
  }
  if (replays.running == 0) call();
}

void Graph::run() {
  Replays::all().begin();
  put_and_wait();
  Replays::all().end();
}

// The time that the stream of the replay spends here is that of the graph's first stream: it waited only
// while that one did.
void Graph::put_and_wait() {
  if (streams_.empty()) return;
  ThreadTimes& times = times_of_this_thread();
  const std::uint64_t waited = times.waited_ns, waited_inside = streams_[0]->waited_ns();
  const std::vector<std::uint64_t> last = put_all();
  for (std::size_t lane = 0; lane < streams_.size(); ++lane) {
    wait_or_fail(*streams_[lane], last[lane],
                 "the end of graph " + std::to_string(number) + " on stream " +
                     std::to_string(streams_[lane]->id));
  }
  times.waited_ns = waited + (streams_[0]->waited_ns() - waited_inside);
}

// Returns the number of the last task on each stream.
std::vector<std::uint64_t> Graph::put_all() {
  const std::lock_guard lock(putting_);
  std::vector<std::uint64_t> numbers, last(streams_.size(), 0);
  numbers.reserve(entries_.size());
  for (const Entry& entry : entries_) {
    const std::size_t lane = entry.node->lane;
    last[lane] = streams_[lane]->put(task_of(entry, numbers));
    numbers.push_back(last[lane]);
  }
  return last;
}

Task Graph::task_of(const Entry& entry, const std::vector<std::uint64_t>& numbers) const {
  Task task{entry.node->name, [node = entry.node] { node->run(); }, entry.node->partners};
  if (entry.waits_for) {
    const Entry& record = entries_[*entry.waits_for];
    const auto stream = streams_[record.node->lane];
    const std::uint64_t number = numbers[*entry.waits_for];
    task.run = [stream, number, event = record.event] {
      wait_or_fail(*stream, number, record_text(event, number, *stream));
    };
  }
  return task;
}

}  // namespace sim
