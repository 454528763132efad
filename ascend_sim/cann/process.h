// This process as one that uses the simulator: its beginning and its end.
#pragma once

namespace sim {

// At the first call that needs a device: serves the control socket, and prepares for the end. Aborts in a
// process that was forked from one that did this, because a fork has none of the threads; CANN does not
// survive a fork either.
void begin_process();

// Streams begin no more tasks, and nothing blocks any longer.
void end_process();
bool process_is_ending();

// Whether the interpreter that called is on its way out and has waited for streams for too long. torch_npu
// synchronises its devices then, which would never end with a blocked stream. CANN ends such waits after a
// time limit of its own.
bool exit_takes_too_long();

}  // namespace sim
