// The last things that happened on the streams of this process, in the order in which they happened.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sim {

enum class Moment { queued, began, ended };

struct HistoryEntry {
  std::uint64_t number;  // counts from 0 without gaps
  int stream, device;
  Moment moment;
  std::uint64_t task;
  const std::string* name;
};

constexpr std::uint64_t history_length = 1 << 18;

void remember(int stream, int device, Moment moment, std::uint64_t task, const std::string& name);

struct HistoryPart {
  std::vector<HistoryEntry> entries;
  std::uint64_t lost;  // entries that were asked for and are gone
  std::uint64_t next;  // where to go on reading
};

HistoryPart history_from(std::uint64_t number, std::uint64_t at_most);

}  // namespace sim
