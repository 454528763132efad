// Just enough JSON for the answers of the control socket.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace sim::json {

inline const char* const null = "null";

std::string text(const std::string& value);  // quoted
std::string list(const std::vector<std::string>& values);
std::string object(std::initializer_list<std::pair<const char*, std::string>> members);

template <class Values, class Function>
std::string list_of(const Values& values, Function one) {
  std::vector<std::string> texts;
  for (const auto& value : values) texts.push_back(one(value));
  return list(texts);
}

}  // namespace sim::json
