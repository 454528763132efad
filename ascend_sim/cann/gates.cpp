#include "gates.h"

#include <fnmatch.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <utility>

#include "sim.h"

namespace sim {
namespace {

using std::chrono::microseconds;

// How long anyone stands here without looking whether the stream is to end.
constexpr std::chrono::milliseconds longest_sleep{100};

// Never freed: streams may still run while the process exits.
struct Rules {
  std::mutex mutex;
  std::condition_variable changed;
  int gates_ever = 0;
  std::vector<Gate> gates;
  std::vector<std::pair<std::string, microseconds>> delays;

  static Rules& all() {
    static auto* rules = new Rules;
    return *rules;
  }

  Gate* find(int number) {
    for (Gate& gate : gates) {
      if (gate.number == number) return &gate;
    }
    return nullptr;
  }

  // The first gate that wants this task. It has it from now on.
  Gate* gate_for(const std::string& task) {
    for (Gate& gate : gates) {
      if (gate.more == 0 || fnmatch(gate.pattern.c_str(), task.c_str(), 0) != 0) continue;
      if (gate.more) --*gate.more;
      ++gate.holds;
      return &gate;
    }
    return nullptr;
  }
};

microseconds delay_of(const std::string& task) {
  Rules& rules = Rules::all();
  const std::lock_guard lock(rules.mutex);
  for (auto rule = rules.delays.rbegin(); rule != rules.delays.rend(); ++rule) {
    if (fnmatch(rule->first.c_str(), task.c_str(), 0) == 0) return rule->second;
  }
  return microseconds(0);
}

}  // namespace

int close_gate(const std::string& pattern, std::optional<std::uint64_t> count) {
  Rules& rules = Rules::all();
  const std::lock_guard lock(rules.mutex);
  rules.gates.push_back({++rules.gates_ever, pattern, count, 0});
  return rules.gates_ever;
}

bool open_gate(int number) {
  Rules& rules = Rules::all();
  const std::lock_guard lock(rules.mutex);
  const auto opened = std::erase_if(rules.gates, [&](const Gate& gate) { return gate.number == number; });
  rules.changed.notify_all();
  return opened != 0;
}

std::vector<Gate> closed_gates() {
  Rules& rules = Rules::all();
  const std::lock_guard lock(rules.mutex);
  return rules.gates;
}

void pass_gates(const std::string& task) {
  Rules& rules = Rules::all();
  std::unique_lock lock(rules.mutex);
  while (const Gate* gate = rules.gate_for(task)) {
    const int number = gate->number;
    const Waiting waiting("held at gate " + std::to_string(number));
    while (rules.find(number) != nullptr && !shutting_down()) rules.changed.wait_for(lock, longest_sleep);
    if (Gate* left = rules.find(number)) --left->holds;
    if (shutting_down()) return;
  }
}

void delay_tasks(const std::string& pattern, microseconds time) {
  Rules& rules = Rules::all();
  const std::lock_guard lock(rules.mutex);
  std::erase_if(rules.delays, [&](const auto& rule) { return rule.first == pattern; });
  if (time.count() > 0) rules.delays.emplace_back(pattern, time);
}

void pass_delay(const std::string& task) {
  const microseconds time = delay_of(task);
  if (time.count() == 0) return;
  const auto end = std::chrono::steady_clock::now() + time;
  const Waiting waiting("delayed by " + std::to_string(time.count()) + " us");
  Rules& rules = Rules::all();
  std::unique_lock lock(rules.mutex);
  while (std::chrono::steady_clock::now() < end && !shutting_down()) {
    rules.changed.wait_until(lock, std::min(end, std::chrono::steady_clock::now() + longest_sleep));
  }
}

}  // namespace sim
