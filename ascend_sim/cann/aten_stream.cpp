#include "aten_stream.h"

#include "sim.h"

#include <ATen/CPUGeneratorImpl.h>
#include <torch_npu/csrc/aten/NPUGeneratorImpl.h>
#include <torch_npu/csrc/core/npu/NPUStream.h>
#include <torch_npu/csrc/framework/OpCommand.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace ascend_sim {
namespace {

using at_npu::native::OpCommand;

void launch_on(aclrtStream stream, const std::string& name, std::function<void()> task) {
  auto work = std::make_shared<sim::Task>(sim::Task{name, std::move(task)});
  work->kernel = true;
  through_task_queue(name, [stream, work] { sim::enqueue(stream, std::move(*work)); });
}

// Not NPUStream::stream(), which first empties the task queue.
aclrtStream current_stream() { return c10_npu::getCurrentNPUStream().stream(/*need_empty=*/false); }

[[noreturn]] void abort_because_of(const std::string& name, const char* message) {
  std::fprintf(stderr, "[simulated Ascend] %s failed on its stream: %s\n", name.c_str(), message);
  std::abort();
}

}  // namespace

c10::DeviceIndex current_device() { return c10_npu::current_device(); }

void through_task_queue(const std::string& name, std::function<void()> launch) {
  OpCommand::RunOpApiV2(name, [launch = std::move(launch)]() -> int {
    launch();
    return ACL_SUCCESS;
  });
}

void launch(const std::string& name, std::function<void()> task) {
  launch_on(current_stream(), name, [name, task = std::move(task)] {
    try {
      task();
    } catch (const c10::Error& error) {
      abort_because_of(name, error.what_without_backtrace());
    } catch (const std::exception& error) {
      abort_because_of(name, error.what());
    }
  });
}

void launch_and_wait(const std::string& name, std::function<void()> task) {
  auto error = std::make_shared<std::exception_ptr>();
  launch_on(current_stream(), name, [error, task = std::move(task)] {
    try {
      task();
    } catch (...) {
      *error = std::current_exception();
    }
  });
  c10_npu::getCurrentNPUStream().synchronize();
  if (*error) std::rethrow_exception(*error);
}

bool is_capturing() { return sim::graph_captured_by(current_stream()) != 0; }

RandomNumbers RandomNumbers::take(const std::optional<at::Generator>& device_generator) {
  const bool given = device_generator.has_value() && device_generator->defined();
  at::Generator generator =
      given ? *device_generator : at_npu::detail::getDefaultNPUGenerator(current_device());
  TORCH_CHECK(
      generator.device().type() == c10::DeviceType::PrivateUse1,
      "Expected a 'npu' device type for generator but found '", generator.device(), "'");
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t numbers_of_one_kernel = 4;
  auto* state = generator.get<at_npu::NPUGeneratorImpl>();
  const at_npu::PhiloxNpuState inputs = state->philox_npu_state(numbers_of_one_kernel);
  RandomNumbers numbers;
  if (inputs.captured_) {
    numbers.offset_ = inputs.offset_intragraph_;
    numbers.seed_of_replay_ = static_cast<const uint64_t*>(inputs.seed_.ptr->const_data_ptr());
    numbers.offset_of_replay_ = static_cast<const uint64_t*>(inputs.offset_.ptr->const_data_ptr());
  } else {
    numbers.seed_ = inputs.seed_.val;
    numbers.offset_ = inputs.offset_.val;
  }
  return numbers;
}

at::Generator RandomNumbers::generator() const {
  const uint64_t seed = seed_of_replay_ == nullptr ? seed_ : *seed_of_replay_;
  const uint64_t before = offset_of_replay_ == nullptr ? 0 : *offset_of_replay_;
  const uint64_t mixed = (seed + before + offset_) * 0x9e3779b97f4a7c15u;
  return at::make_generator<at::CPUGeneratorImpl>(mixed >> 32);  // it takes 32 bits of a seed
}

}  // namespace ascend_sim

namespace ascend_sim {
namespace {

using std::chrono::steady_clock;

// A stretch of a stream, all in nanoseconds; `begin` and `end` of the monotonic clock, which all processes
// share. The others: what the stream had done before the stretch, and by its end.
struct Stretch {
  std::uint64_t begin, end, tasks_before, waited_before, tasks_by_end, waited_by_end;
};

std::mutex stretches_mutex;
std::vector<Stretch> stretches;  // that have ended and were not taken
thread_local Stretch open_stretch{};  // of the stream whose thread this is

std::uint64_t nanoseconds(steady_clock::time_point moment) { return moment.time_since_epoch().count(); }

void begin_stretch() {
  const sim::ThreadTimes& times = sim::times_of_this_thread();
  open_stretch = {nanoseconds(steady_clock::now()), 0, times.tasks_ns, times.waited_ns, 0, 0};
}

void end_stretch(std::chrono::microseconds at_least) {
  const sim::ThreadTimes& times = sim::times_of_this_thread();
  const std::uint64_t entered = nanoseconds(steady_clock::now());  // this task is not among them yet
  const steady_clock::time_point begin{std::chrono::nanoseconds(open_stretch.begin)};
  std::this_thread::sleep_until(begin + at_least);
  open_stretch.end = nanoseconds(steady_clock::now());
  open_stretch.tasks_by_end = times.tasks_ns + (open_stretch.end - entered);
  open_stretch.waited_by_end = times.waited_ns;
  const std::lock_guard<std::mutex> lock(stretches_mutex);
  stretches.push_back(open_stretch);
}

}  // namespace
}  // namespace ascend_sim

extern "C" {

void ascend_sim_occupy(int milliseconds) {
  ascend_sim::launch("occupy", [milliseconds] {
    std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
  });
}

void ascend_sim_begin_stretch() { ascend_sim::launch("begin stretch", ascend_sim::begin_stretch); }

void ascend_sim_end_stretch(long microseconds) {
  const std::chrono::microseconds at_least(microseconds);
  ascend_sim::launch("end stretch", [at_least] { ascend_sim::end_stretch(at_least); });
}

// Moves the oldest stretches into `taken`, six numbers each; returns how many.
long ascend_sim_take_stretches(std::uint64_t* taken, long at_most) {
  using ascend_sim::stretches;
  const std::lock_guard<std::mutex> lock(ascend_sim::stretches_mutex);
  const long count = std::min<long>(at_most, stretches.size());
  std::memcpy(taken, stretches.data(), count * sizeof(ascend_sim::Stretch));
  stretches.erase(stretches.begin(), stretches.begin() + count);
  return count;
}

// Of the calling thread: nanoseconds that it stood still in the simulator, and how often.
void ascend_sim_times_waited(std::uint64_t* nanoseconds, std::uint64_t* waits) {
  const sim::ThreadTimes& times = sim::times_of_this_thread();
  *nanoseconds = times.waited_ns;
  *waits = times.waits;
}

}  // extern "C"
