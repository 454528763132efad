#include "waiting.h"

#include <pthread.h>
#include <unistd.h>

#include <map>
#include <mutex>

#include "stream.h"

namespace sim {
namespace {

// Never freed: streams may still run while the process exits.
struct Waits {
  std::mutex mutex;
  std::uint64_t begun = 0;
  std::map<std::uint64_t, Wait> by_number;

  static Waits& all() {
    static auto* waits = new Waits;
    return *waits;
  }
};

std::string name_of_this_thread() {
  char name[16] = "";  // the longest that Linux has
  pthread_getname_np(pthread_self(), name, sizeof name);
  return name;
}

std::uint64_t begin_wait(std::string reason, Partners partners, std::uint64_t task) {
  const Stream* stream = Stream::of_this_thread();
  const int stream_id = stream == nullptr ? no_stream : stream->id;
  Wait wait{gettid(), name_of_this_thread(), stream_id, std::move(reason), std::move(partners), task};
  Waits& waits = Waits::all();
  const std::lock_guard lock(waits.mutex);
  waits.by_number.emplace(++waits.begun, std::move(wait));
  return waits.begun;
}

}  // namespace

Waiting::Waiting(std::string reason, Partners partners)
    : number_(begin_wait(std::move(reason), std::move(partners), 0)) {}

Waiting::Waiting(std::string reason, std::uint64_t task) : number_(begin_wait(std::move(reason), {}, task)) {}

Waiting::~Waiting() {
  {
    Waits& waits = Waits::all();
    const std::lock_guard lock(waits.mutex);
    waits.by_number.erase(number_);
  }
  ThreadTimes& times = times_of_this_thread();
  times.waited_ns += (std::chrono::steady_clock::now() - began_).count();
  ++times.waits;
}

ThreadTimes& times_of_this_thread() {
  thread_local ThreadTimes times;
  return times;
}

std::vector<Wait> all_waits() {
  Waits& waits = Waits::all();
  const std::lock_guard lock(waits.mutex);
  std::vector<Wait> all;
  for (const auto& [number, wait] : waits.by_number) all.push_back(wait);
  return all;
}

}  // namespace sim
