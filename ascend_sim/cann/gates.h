// What a test does to tasks when they are about to run: hold them at a gate, and make them take time.
#pragma once

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace sim {

struct Gate {
  int number;
  std::string pattern;                // fnmatch(3), of task names
  std::optional<std::uint64_t> more;  // how many more tasks it will hold; nothing: all
  std::uint64_t holds;                // how many tasks stand at it now
};

int close_gate(const std::string& pattern, std::optional<std::uint64_t> count);
bool open_gate(int number);  // false when there is no such gate
std::vector<Gate> closed_gates();

// On the stream's thread: returns when no gate holds a task of this name, or when the stream is to end.
void pass_gates(const std::string& task);

// Of several patterns that fit, the latest counts.
void delay_tasks(const std::string& pattern, std::chrono::microseconds time);

// On the stream's thread, while a task of this name runs.
void pass_delay(const std::string& task);

}  // namespace sim
