#include "listing.h"

#include <unistd.h>

#include <optional>
#include <vector>

#include "gates.h"
#include "history.h"
#include "json.h"
#include "sim.h"
#include "stream.h"
#include "waiting.h"

namespace sim {
namespace {

// A process may have done a lot; an answer has at most so many entries of it.
constexpr std::uint64_t entries_in_one_answer = 20'000;

std::string json_of(const Partners& partners) {
  if (partners.operation.empty()) return json::null;
  return json::object({
      {"communicator", json::text(partners.communicator)},
      {"operation", json::text(partners.operation)},
      {"pids", json::list_of(partners.pids, [](int pid) { return std::to_string(pid); })},
      {"unknown", std::to_string(partners.unknown)},
  });
}

std::string json_of(const Wait& wait) {
  return json::object({
      {"thread", std::to_string(wait.thread)},
      {"thread_name", json::text(wait.thread_name)},
      {"reason", json::text(wait.reason)},
      {"partners", json_of(wait.partners)},
      {"task", wait.task == 0 ? json::null : std::to_string(wait.task)},
  });
}

std::string json_of(const Contained& task) {
  return json::object({{"name", json::text(task.name)}, {"partners", json_of(task.partners)}});
}

std::string json_of(const TaskSummary& task, const Wait* wait = nullptr) {
  const std::string contains =
      task.contains == nullptr
          ? json::list({})
          : json::list_of(*task.contains, [](const Contained& inner) { return json_of(inner); });
  return json::object({
      {"number", std::to_string(task.number)},
      {"name", json::text(task.name)},
      {"partners", json_of(task.partners)},
      {"contains", contains},
      {"waiting", wait == nullptr ? json::null : json_of(*wait)},
  });
}

// The innermost wait of a stream's thread.
const Wait* wait_of(int stream, const std::vector<Wait>& waits) {
  const Wait* latest = nullptr;
  for (const Wait& wait : waits) {
    if (wait.stream == stream) latest = &wait;
  }
  return latest;
}

std::string json_of(const StreamSummary& stream, const std::vector<Wait>& waits) {
  const auto& running = stream.running;
  return json::object({
      {"stream", std::to_string(stream.id)},
      {"device", std::to_string(stream.device)},
      {"graph", stream.graph == 0 ? json::null : std::to_string(stream.graph)},
      {"queued", json::list_of(stream.queued, [](const TaskSummary& task) { return json_of(task); })},
      {"running", running ? json_of(*running, wait_of(stream.id, waits)) : json::null},
      {"ended", std::to_string(stream.ended)},
      {"error", stream.error == ACL_SUCCESS ? json::null : std::to_string(stream.error)},
  });
}

std::string json_of(const Gate& gate) {
  return json::object({
      {"gate", std::to_string(gate.number)},
      {"pattern", json::text(gate.pattern)},
      {"holds", std::to_string(gate.holds)},
  });
}

std::string json_of_links() {
  return json::object({
      {"us_per_message", std::to_string(links().us_per_message)},
      {"mb_per_s", std::to_string(links().mb_per_s)},
      {"eager_bytes", std::to_string(links().eager_bytes)},
  });
}

const char* name_of(Moment moment) {
  switch (moment) {
    case Moment::queued: return "queued";
    case Moment::began: return "began";
    case Moment::ended: return "ended";
  }
  return "";
}

std::string json_of(const HistoryEntry& entry) {
  return json::object({
      {"number", std::to_string(entry.number)},
      {"stream", std::to_string(entry.stream)},
      {"device", std::to_string(entry.device)},
      {"event", json::text(name_of(entry.moment))},
      {"task", json::text(*entry.name)},
      {"task_number", std::to_string(entry.task)},
  });
}

}  // namespace

// A task may end while this reads one stream after another, so a wait and its stream may not fit for a
// moment: what is to be believed has to be seen twice.
std::string listing() {
  const std::vector<Wait> waits = all_waits();
  std::vector<std::string> streams, host;
  for (const auto& stream : Stream::all()) {
    const StreamSummary summary = stream->summary();
    const bool was_used = summary.ended > 0 || summary.running || !summary.queued.empty();
    if (was_used) streams.push_back(json_of(summary, waits));
  }
  for (const Wait& wait : waits) {
    if (wait.stream == no_stream) host.push_back(json_of(wait));
  }
  return json::object({
      {"pid", std::to_string(getpid())},
      {"streams", json::list(streams)},
      {"host", json::list(host)},
      {"gates", json::list_of(closed_gates(), [](const Gate& gate) { return json_of(gate); })},
      {"links", json_of_links()},
  });
}

std::string history_listing(std::uint64_t from) {
  const HistoryPart part = history_from(from, entries_in_one_answer);
  return json::object({
      {"entries", json::list_of(part.entries, [](const HistoryEntry& entry) { return json_of(entry); })},
      {"lost", std::to_string(part.lost)},
      {"next", std::to_string(part.next)},
  });
}

}  // namespace sim
