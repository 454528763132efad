// The devices of this process.
#pragma once

#include <cstddef>

namespace sim {

int device_count();
std::size_t device_bytes();  // the memory of each

// For the calling thread.
void use_device(int device);

}  // namespace sim
