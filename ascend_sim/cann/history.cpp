#include "history.h"

#include <algorithm>
#include <mutex>
#include <unordered_set>

namespace sim {
namespace {

// Never freed: streams may still run while the process exits.
struct History {
  std::mutex mutex;
  std::uint64_t count = 0;
  std::vector<HistoryEntry> ring;         // entry n is at n % history_length
  std::unordered_set<std::string> names;  // few are different, so that an entry only points to one

  static History& whole() {
    static auto* history = new History;
    return *history;
  }
};

}  // namespace

void remember(int stream, int device, Moment moment, std::uint64_t task, const std::string& name) {
  History& history = History::whole();
  const std::lock_guard lock(history.mutex);
  const HistoryEntry entry{history.count, stream, device, moment, task, &*history.names.insert(name).first};
  if (history.ring.size() < history_length) {
    history.ring.push_back(entry);
  } else {
    history.ring[history.count % history_length] = entry;
  }
  ++history.count;
}

HistoryPart history_from(std::uint64_t number, std::uint64_t at_most) {
  History& history = History::whole();
  const std::lock_guard lock(history.mutex);
  const std::uint64_t oldest = history.count - history.ring.size();
  const std::uint64_t first = std::min(std::max(number, oldest), history.count);
  const std::uint64_t next = std::min(first + at_most, history.count);
  HistoryPart part{{}, first > number ? first - number : 0, next};
  for (std::uint64_t n = first; n < next; ++n) part.entries.push_back(history.ring[n % history_length]);
  return part;
}

}  // namespace sim
