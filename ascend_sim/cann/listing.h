// What this process is doing and has done, as JSON.
#pragma once

#include <cstdint>
#include <string>

namespace sim {

std::string listing();
std::string history_listing(std::uint64_t from);

}  // namespace sim
