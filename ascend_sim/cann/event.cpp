// An event is the place of its latest record on a stream. Whoever waits takes the record that is current at
// the time of the call: recording the event again does not change what was waited for. A record in a capture
// counts while that goes on, and only in it.
#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>

#include "capture.h"
#include "refusal.h"
#include "stream.h"

namespace sim {
namespace {

struct Record {
  int event;
  std::shared_ptr<Stream> stream;
  std::uint64_t task = 0;
  std::atomic<std::uint64_t> microseconds{0};  // when the task ran

  bool has_run() const { return stream->has_ended(task); }

  aclError wait() const {
    return stream->wait_for(task, "event " + std::to_string(event) + ", recorded by task " +
                                      std::to_string(task) + " on stream " + std::to_string(stream->id));
  }
};

struct Event {
  const int number;
  const bool can_be_waited_for;  // else a capture leaves its records out, as CANN does
  std::shared_ptr<Record> record = {};  // none yet
  std::optional<CapturedRecord> captured = {};

  bool is_being_captured() const { return captured && sim::is_being_captured(*captured); }
};

// Never freed: streams may still run while the process exits.
struct Events {
  std::mutex mutex;
  int ever = 0;
  std::map<aclrtEvent, std::unique_ptr<Event>> by_handle;

  static Events& all() {
    static auto* events = new Events;
    return *events;
  }

  Event& find(aclrtEvent handle) {
    const auto found = by_handle.find(handle);
    if (found == by_handle.end()) not_simulated("the use of an event that does not exist, or no longer,");
    return *found->second;
  }
};

Event copy_of(aclrtEvent handle) {
  Events& events = Events::all();
  const std::lock_guard lock(events.mutex);
  return events.find(handle);
}

std::shared_ptr<Record> record_of(aclrtEvent handle) { return copy_of(handle).record; }

// An event that was never recorded counts as one that has happened.
bool has_happened(aclrtEvent handle) {
  const auto record = record_of(handle);
  return record == nullptr || record->has_run();
}

// Only a stream can look at an event whose latest record is in a capture.
aclError refuse_to_look_at(aclrtEvent handle, const char* call) {
  const Event event = copy_of(handle);
  if (!event.is_being_captured()) return ACL_SUCCESS;
  return refuse(ERROR_CODE(ACL_ERROR_RT_EVENT_CAPTURED),
                std::string(call) + " of event " + std::to_string(event.number) +
                    ", which was recorded in a capture");
}

// A capture has no task that would wait for what is outside of it.
aclError refuse_from_outside(const Event& event, const Stream& stream) {
  return refuse(ERROR_CODE(ACL_ERROR_RT_CAPTURE_DEPENDENCY),
                "aclrtStreamWaitEvent on stream " + std::to_string(stream.id) +
                    ", which is in a capture, of event " + std::to_string(event.number) +
                    ", which was recorded outside of it");
}

std::uint64_t now_in_microseconds() {
  using namespace std::chrono;
  return duration_cast<microseconds>(steady_clock::now().time_since_epoch()).count();
}

}  // namespace
}  // namespace sim

using sim::Events;

extern "C" {

// The flags say what an event will be used for; every event here serves all uses, except between processes, and
// except for the external events of graphs, which torch_npu makes of values (values.cpp).
aclError aclrtCreateEventExWithFlag(aclrtEvent* handle, uint32_t flags) {
  if (flags == ACL_EVENT_EXTERNAL) sim::not_simulated("an event with the flag ACL_EVENT_EXTERNAL");
  Events& events = Events::all();
  const std::lock_guard lock(events.mutex);
  auto event = std::make_unique<sim::Event>(sim::Event{events.ever++, (flags & ACL_EVENT_SYNC) != 0});
  *handle = event.get();
  events.by_handle[*handle] = std::move(event);
  return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  return aclrtCreateEventExWithFlag(event, flag);
}

aclError aclrtDestroyEvent(aclrtEvent handle) {
  Events& events = Events::all();
  const std::lock_guard lock(events.mutex);
  return events.by_handle.erase(handle) == 1 ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  Events& events = Events::all();
  const std::lock_guard lock(events.mutex);
  sim::Event& event = events.find(handle);
  auto record = std::make_shared<sim::Record>();
  record->event = event.number;
  record->stream = sim::Stream::find(stream);
  if (sim::is_capturing(*record->stream)) {
    if (event.can_be_waited_for) event.captured = sim::capture_record(*record->stream, event.number);
    return ACL_SUCCESS;
  }
  record->task =
      sim::enqueue(stream, {"event record", [record] { record->microseconds = sim::now_in_microseconds(); }});
  event.record = std::move(record);
  return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream handle, aclrtEvent event_handle) {
  const sim::Event event = sim::copy_of(event_handle);
  const auto stream = sim::Stream::find(handle);
  if (event.is_being_captured()) return sim::capture_wait(stream, *event.captured);
  if (event.record == nullptr) return ACL_SUCCESS;
  if (sim::is_capturing(*stream)) return sim::refuse_from_outside(event, *stream);
  sim::enqueue(handle, {"event wait", [record = event.record] {
                          const aclError error = record->wait();
                          if (error != ACL_SUCCESS) sim::fail_stream(error);
                        }});
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent event) {
  if (const aclError error = sim::refuse_to_look_at(event, "aclrtSynchronizeEvent")) return error;
  const auto record = sim::record_of(event);
  return record == nullptr ? ACL_SUCCESS : record->wait();
}

aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus* status) {
  if (const aclError error = sim::refuse_to_look_at(event, "aclrtQueryEventStatus")) return error;
  *status =
      sim::has_happened(event) ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus* status) {
  if (const aclError error = sim::refuse_to_look_at(event, "aclrtQueryEventWaitStatus")) return error;
  *status = sim::has_happened(event) ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent from, aclrtEvent to) {
  for (const aclrtEvent event : {from, to}) {
    if (const aclError error = sim::refuse_to_look_at(event, "aclrtEventElapsedTime")) return error;
  }
  const auto first = sim::record_of(from), second = sim::record_of(to);
  if (first == nullptr || second == nullptr || !first->has_run() || !second->has_run()) {
    return ACL_ERROR_RT_EVENT_TIMESTAMP_INVALID;
  }
  *milliseconds =
      (static_cast<double>(second->microseconds) - static_cast<double>(first->microseconds)) / 1000;
  return ACL_SUCCESS;
}

}  // extern "C"
