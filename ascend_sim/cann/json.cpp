#include "json.h"

#include <cstdio>

namespace sim::json {
namespace {

std::string joined(const std::vector<std::string>& values) {
  std::string all;
  for (const std::string& value : values) {
    if (!all.empty()) all += ", ";
    all += value;
  }
  return all;
}

}  // namespace

std::string text(const std::string& value) {
  std::string quoted = "\"";
  for (const unsigned char c : value) {
    if (c == '"' || c == '\\') {
      quoted += '\\';
      quoted += static_cast<char>(c);
    } else if (c < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", c);
      quoted += escaped;
    } else {
      quoted += static_cast<char>(c);
    }
  }
  return quoted + '"';
}

std::string list(const std::vector<std::string>& values) { return "[" + joined(values) + "]"; }

std::string object(std::initializer_list<std::pair<const char*, std::string>> members) {
  std::vector<std::string> texts;
  for (const auto& [name, value] : members) texts.push_back(text(name) + ": " + value);
  return "{" + joined(texts) + "}";
}

}  // namespace sim::json
