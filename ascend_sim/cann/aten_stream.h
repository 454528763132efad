// The way of a kernel to the device, as torch_npu sends its own: through its task queue, then onto a stream.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>

namespace ascend_sim {

c10::DeviceIndex current_device();

// Call something in the order of launches, in the thread of torch_npu's task queue if there is one. The queue
// belongs to the current device, whatever the stream is.
void through_task_queue(const std::string& name, std::function<void()> launch);

// Put a task on the current stream of the current device, and return. If it throws, the process aborts with
// the name and the message: on a device, too, such an error comes long after the call, and torch_npu's queue
// is lost.
void launch(const std::string& name, std::function<void()> task);

// The same, and wait until the stream has done it. What it throws is thrown here.
void launch_and_wait(const std::string& name, std::function<void()> task);

// Whether the current stream captures a graph.
bool is_capturing();

// What one operator draws, from the state of a device generator (the default one if none is given), which moves
// on by one kernel; so manual_seed and get_state mean what they mean on a device. In a capture torch_npu says
// where on the device the state of each replay will be.
class RandomNumbers {
 public:
  static RandomNumbers take(const std::optional<at::Generator>& device_generator);

  // For the CPU's kernel: another one, with other numbers, for each replay.
  at::Generator generator() const;

 private:
  std::uint64_t seed_ = 0, offset_ = 0;
  const std::uint64_t *seed_of_replay_ = nullptr, *offset_of_replay_ = nullptr;  // in device memory
};

}  // namespace ascend_sim
