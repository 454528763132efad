// What is set from outside.
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>

#include "sim.h"

namespace sim {

long setting(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  if (text == nullptr || *text == '\0') return otherwise;
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text, &end, 10);
  if (*end == '\0' && errno == 0) return value;
  std::fprintf(stderr, "simulated Ascend: %s=%s is not a whole number (process %d)\n", name, text, getpid());
  std::abort();
}

Links& links() {
  static auto* all = new Links{setting("ASCEND_SIM_LINK_US", 0), setting("ASCEND_SIM_LINK_MB_PER_S", 0),
                               setting("ASCEND_SIM_EAGER_BYTES", 0)};
  return *all;
}

}  // namespace sim
