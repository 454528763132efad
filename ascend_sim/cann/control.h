// The socket through which tests see and steer this process.
#pragma once

namespace sim {

// From now on, until the process ends.
void serve_control_socket();

}  // namespace sim
