#include "process.h"

#include <dlfcn.h>
#include <execinfo.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <mutex>
#include <string>
#include <thread>

#include "control.h"
#include "sim.h"
#include "stream.h"

namespace sim {
namespace {

using std::chrono::milliseconds;
using Clock = std::chrono::steady_clock;

std::atomic<bool> ending{false};
std::atomic<int> pid_at_beginning{0};

constexpr std::chrono::seconds exit_limit{2};

// Its functions that run at exit are called by Py_FinalizeEx, which is then on the stack.
bool interpreter_is_exiting() {
  void* frames[256];
  const int count = backtrace(frames, std::size(frames));
  return std::any_of(frames, frames + count, [](void* frame) {
    Dl_info function;
    return dladdr(frame, &function) != 0 && function.dli_sname != nullptr &&
           std::strcmp(function.dli_sname, "Py_FinalizeEx") == 0;
  });
}

// Tasks use what other libraries destroy at exit, so those that run get a moment. Those that wait cannot end.
void let_running_tasks_end() {
  const auto deadline = Clock::now() + exit_limit;
  for (const auto& stream : Stream::all()) {
    while (stream->is_busy() && Clock::now() < deadline) {
      std::this_thread::sleep_for(milliseconds(1));
    }
  }
}

}  // namespace

void begin_process() {
  static std::once_flag once;
  std::call_once(once, [] {
    pid_at_beginning = getpid();
    serve_control_socket();
    std::atexit(end_process);
  });
  if (pid_at_beginning != getpid()) not_simulated("the use of a device in a forked process");
}

void end_process() {
  ending = true;
  for (const auto& stream : Stream::all()) stream->wake();
  let_running_tasks_end();
}

bool process_is_ending() { return ending; }

bool exit_takes_too_long() {
  if (gettid() != getpid() || !interpreter_is_exiting()) return false;
  static const auto deadline = Clock::now() + exit_limit;  // for all waits together, from the first one on
  return Clock::now() > deadline;
}

void not_simulated(const char* what) {
  const std::string line = std::string("simulated Ascend: ") + what + " is not simulated (process " +
                           std::to_string(getpid()) + ")\n";
  if (write(STDERR_FILENO, line.data(), line.size()) < 0) std::abort();
  std::abort();
}

}  // namespace sim
