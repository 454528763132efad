#include "stream.h"

#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <thread>
#include <utility>

#include "capture.h"
#include "device.h"
#include "gates.h"
#include "history.h"
#include "process.h"
#include "waiting.h"

namespace sim {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

// How long anyone waits here without looking round.
constexpr milliseconds longest_sleep{100};

// Never freed: streams may still run while the process exits.
struct Streams {
  std::mutex mutex;
  int ever = 0;
  std::map<aclrtStream, std::shared_ptr<Stream>> by_handle;
  std::map<int, std::shared_ptr<Stream>> default_of_device, last_of_device;

  static Streams& all() {
    static auto* streams = new Streams;
    return *streams;
  }

  std::shared_ptr<Stream> create(int device, int graph = 0) {
    auto stream = std::make_shared<Stream>(ever++, device, graph);
    by_handle[stream.get()] = stream;
    return stream;
  }

  std::shared_ptr<Stream> default_stream(int device) {
    std::shared_ptr<Stream>& stream = default_of_device[device];
    if (stream == nullptr) stream = create(device);
    return stream;
  }

  // For tasks that wait for all other streams.
  std::shared_ptr<Stream> last_stream(int device) {
    const std::lock_guard lock(mutex);
    std::shared_ptr<Stream>& stream = last_of_device[device];
    if (stream == nullptr) stream = create(device);
    return stream;
  }
};

std::atomic<std::uint64_t> tasks_ever{0};
thread_local Stream* stream_of_this_thread = nullptr;

// Signals are for the threads of the interpreter.
void block_signals() {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, nullptr);
}

TaskSummary summary_of(std::uint64_t number, const Task& task) {
  return {number, task.name, task.partners, task.contains};
}

}  // namespace

std::shared_ptr<Stream> Stream::create(int device, int graph) {
  Streams& streams = Streams::all();
  const std::lock_guard lock(streams.mutex);
  return streams.create(device, graph);
}

std::shared_ptr<Stream> Stream::find(aclrtStream handle) {
  Streams& streams = Streams::all();
  const std::lock_guard lock(streams.mutex);
  if (handle == nullptr) return streams.default_stream(current_device());
  const auto found = streams.by_handle.find(handle);
  if (found != streams.by_handle.end()) return found->second;
  not_simulated("the use of a stream that does not exist, or no longer,");
}

std::vector<std::shared_ptr<Stream>> Stream::all() {
  Streams& streams = Streams::all();
  const std::lock_guard lock(streams.mutex);
  std::vector<std::shared_ptr<Stream>> all;
  for (const auto& [handle, stream] : streams.by_handle) all.push_back(stream);
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a->id < b->id; });
  return all;
}

Stream* Stream::of_this_thread() { return stream_of_this_thread; }

std::uint64_t Stream::put(Task task) {
  const std::lock_guard lock(mutex_);
  last_put_ = ++tasks_ever;
  remember(id, device, Moment::queued, last_put_, task.name);
  queue_.push_back({last_put_, std::move(task)});
  if (!working_) {
    working_ = true;
    std::thread([self = shared_from_this()] { self->work(); }).detach();
  }
  changed_.notify_all();
  return last_put_;
}

void Stream::work() {
  block_signals();
  prctl(PR_SET_TIMERSLACK, 1000);  // nanoseconds; by default links and kernels would end up to 50 us late
  pthread_setname_np(pthread_self(), ("stream " + std::to_string(id)).c_str());
  stream_of_this_thread = this;
  use_device(device);
  while (take_next()) {
    const auto began = Clock::now();
    pass_gates(current_->task.name);
    if (has_to_stop()) return;
    run_current();
    end_current();
    times_of_this_thread().tasks_ns += (Clock::now() - began).count();
  }
}

bool Stream::has_to_stop() const { return destroyed_ || process_is_ending(); }

bool Stream::take_next() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return has_to_stop() || (error_ == ACL_SUCCESS && !queue_.empty()); });
  if (has_to_stop()) return false;
  current_ = std::move(queue_.front());
  queue_.pop_front();
  return true;
}

void Stream::run_current() {
  remember(id, device, Moment::began, current_->number, current_->task.name);
  pass_delay(current_->task.name);
  std::function<void()> run;
  {
    const std::lock_guard lock(mutex_);  // the listing reads the rest of the task
    run = std::move(current_->task.run);
  }
  run();
}

void Stream::end_current() {
  const std::lock_guard lock(mutex_);
  if (error_ == ACL_SUCCESS && !has_to_stop()) {
    remember(id, device, Moment::ended, current_->number, current_->task.name);
    last_ended_ = current_->number;
    waited_ns_ = times_of_this_thread().waited_ns;
    ++ended_;
    current_.reset();
  }
  changed_.notify_all();
}

aclError Stream::wait_for(std::uint64_t task, const std::string& why, std::optional<milliseconds> limit) {
  std::unique_lock lock(mutex_);
  if (last_ended_ >= task) return ACL_SUCCESS;
  const auto began = Clock::now();
  const Waiting waiting(why, task);
  while (last_ended_ < task) {
    if (error_ != ACL_SUCCESS) return error_;
    if (has_to_stop() || shutting_down()) return ACL_ERROR_RT_STREAM_NOT_COMPLETE;
    if (limit && Clock::now() - began >= *limit) return ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
    const auto woken = changed_.wait_for(lock, limit ? std::min(*limit, longest_sleep) : longest_sleep);
    if (woken == std::cv_status::timeout && exit_takes_too_long()) limit = milliseconds(0);
  }
  return ACL_SUCCESS;
}

aclError Stream::wait_for_all(std::optional<milliseconds> limit) {
  std::uint64_t last;
  {
    const std::lock_guard lock(mutex_);
    if (error_ != ACL_SUCCESS) return error_;
    last = last_put_;
  }
  return wait_for(last, "synchronising with stream " + std::to_string(id), limit);
}

std::uint64_t Stream::last_put() const {
  const std::lock_guard lock(mutex_);
  return last_put_;
}

bool Stream::has_ended(std::uint64_t task) const {
  const std::lock_guard lock(mutex_);
  return last_ended_ >= task;
}

bool Stream::is_idle() const {
  const std::lock_guard lock(mutex_);
  return last_ended_ == last_put_;
}

aclError Stream::error() const {
  const std::lock_guard lock(mutex_);
  return error_;
}

void Stream::fail(aclError error) {
  const std::lock_guard lock(mutex_);
  if (error_ == ACL_SUCCESS) error_ = error;
  changed_.notify_all();
}

void Stream::destroy() {
  Streams& streams = Streams::all();
  {
    const std::lock_guard lock(streams.mutex);
    streams.by_handle.erase(this);
  }
  destroyed_ = true;
  wake();
}

void Stream::wake() {
  const std::lock_guard lock(mutex_);  // so that nobody is between looking and falling asleep
  changed_.notify_all();
}

bool Stream::is_busy() const {
  {
    const std::lock_guard lock(mutex_);
    if (!current_ || error_ != ACL_SUCCESS) return false;
  }
  const auto waits = all_waits();
  return std::none_of(waits.begin(), waits.end(), [&](const Wait& wait) { return wait.stream == id; });
}

StreamSummary Stream::summary() const {
  const std::lock_guard lock(mutex_);
  StreamSummary summary{id, device, graph, {}, {}, ended_, error_};
  for (const Queued& queued : queue_) summary.queued.push_back(summary_of(queued.number, queued.task));
  if (current_) summary.running = summary_of(current_->number, current_->task);
  return summary;
}

std::uint64_t Stream::waited_ns() const {
  const std::lock_guard lock(mutex_);
  return waited_ns_;
}

std::uint64_t enqueue(aclrtStream handle, Task task) {
  begin_process();
  const auto stream = Stream::find(handle);
  return take_for_graph(stream, task) ? 0 : stream->put(std::move(task));
}

std::uint64_t enqueue_past_capture(aclrtStream stream, Task task) {
  begin_process();
  return Stream::find(stream)->put(std::move(task));
}

void enqueue_behind_all(Task task) {
  begin_process();
  const auto last = Streams::all().last_stream(current_device());
  std::vector<std::pair<std::shared_ptr<Stream>, std::uint64_t>> before;
  for (const auto& stream : Stream::all()) {
    if (stream != last && stream->device == last->device) before.emplace_back(stream, stream->last_put());
  }
  task.run = [before = std::move(before), run = std::move(task.run)] {
    for (const auto& [stream, number] : before) {
      stream->wait_for(number, "what was launched before, on stream " + std::to_string(stream->id));
    }
    between_replays(run);
  };
  last->put(std::move(task));
}

int graph_captured_by(aclrtStream stream) {
  aclmdlRI graph = nullptr;
  capture_status(*Stream::find(stream), &graph);
  return graph == nullptr ? 0 : static_cast<Graph*>(graph)->number;
}

void fail_stream(aclError error) {
  Stream* stream = Stream::of_this_thread();
  if (stream == nullptr) not_simulated("the failure of a stream outside of its tasks");
  stream->fail(error);
}

bool shutting_down() {
  const Stream* stream = Stream::of_this_thread();
  return stream != nullptr && (stream->is_destroyed() || process_is_ending());
}

int stream_id(aclrtStream stream) { return Stream::find(stream)->id; }

}  // namespace sim

using sim::Stream;

namespace {

aclError synchronize_device(std::optional<std::chrono::milliseconds> limit) {
  const int device = sim::current_device();
  if (const aclError error = sim::refuse_if_device_captures(device, "aclrtSynchronizeDevice")) return error;
  const auto began = std::chrono::steady_clock::now();
  for (const auto& stream : Stream::all()) {
    if (stream->device != device) continue;
    auto left = limit;
    if (left) {
      left = std::max(*left - std::chrono::duration_cast<std::chrono::milliseconds>(
                                  std::chrono::steady_clock::now() - began),
                      std::chrono::milliseconds(0));
    }
    if (const aclError error = stream->wait_for_all(left); error != ACL_SUCCESS) return error;
  }
  return ACL_SUCCESS;
}

aclError synchronize_stream(aclrtStream handle, std::optional<std::chrono::milliseconds> limit) {
  const auto stream = Stream::find(handle);
  if (const aclError error = sim::refuse_if_capturing(*stream, "aclrtSynchronizeStream")) return error;
  return stream->wait_for_all(limit);
}

// CANN: a negative limit is none.
std::optional<std::chrono::milliseconds> limit_of(int32_t milliseconds) {
  if (milliseconds < 0) return std::nullopt;
  return std::chrono::milliseconds(milliseconds);
}

}  // namespace

extern "C" {

// Priorities and the ways of launching make no difference to threads.
aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  sim::begin_process();
  *stream = Stream::create(sim::current_device()).get();
  return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream* stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

aclError aclrtDestroyStream(aclrtStream handle) {
  const auto stream = Stream::find(handle);
  if (const aclError error = sim::refuse_if_capturing(*stream, "aclrtDestroyStream")) return error;
  stream->destroy();
  return ACL_SUCCESS;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }

aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronize_stream(stream, {}); }

aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t milliseconds) {
  return synchronize_stream(stream, limit_of(milliseconds));
}

aclError aclrtSynchronizeDevice() { return synchronize_device({}); }

aclError aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) {
  return synchronize_device(limit_of(milliseconds));
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  const auto found = Stream::find(stream);
  if (const aclError error = sim::refuse_if_capturing(*found, "aclrtStreamQuery")) return error;
  *status = found->is_idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return found->error();
}

aclError aclrtStreamGetId(aclrtStream stream, int32_t* id) {
  *id = sim::stream_id(stream);
  return ACL_SUCCESS;
}

}  // extern "C"
