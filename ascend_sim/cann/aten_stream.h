// The way of a kernel to the device, as torch_npu sends its own: through its task queue, then onto a stream.
#pragma once

#include <ATen/core/Generator.h>
#include <c10/core/Device.h>

#include <functional>
#include <optional>
#include <string>

namespace ascend_sim {

c10::DeviceIndex current_device();

// Put a task on the current stream of the current device, and return. If it throws, the process aborts with
// the name and the message: on a device, too, such an error comes long after the call, and torch_npu's queue
// is lost.
void launch(const std::string& name, std::function<void()> task);

// The same, and wait until the stream has done it. What it throws is thrown here.
void launch_and_wait(const std::string& name, std::function<void()> task);

// A CPU generator for one operator. It is seeded from the state of a device generator (the default one if
// none is given), which moves on by one kernel; so manual_seed and get_state mean what they mean on a device.
at::Generator host_generator(const std::optional<at::Generator>& device_generator);

// From now on: memory that torch_npu's caching allocator takes back is overwritten with 0xff: NaN, or -1.
void poison_freed_blocks();

}  // namespace ascend_sim
