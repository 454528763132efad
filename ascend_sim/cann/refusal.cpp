#include "refusal.h"

namespace sim {
namespace {

thread_local std::string latest, returned;

}  // namespace

aclError refuse(ErrorCode error, const std::string& sentence) {
  latest = "simulated Ascend: " + sentence + ": " + error.name + " (" + std::to_string(error.code) + ")";
  return error.code;
}

}  // namespace sim

extern "C" {

// As in CANN, a message is returned once, and nothing when there is none.
const char* aclGetRecentErrMsg() {
  if (sim::latest.empty()) return nullptr;
  sim::returned = std::move(sim::latest);
  sim::latest.clear();
  return sim::returned.c_str();
}

}  // extern "C"
