#include "root_info.h"

#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <set>

#include "communicator_memory.h"

namespace sim::hccl {
namespace {

// Those of this process that are still open. Two members of one communicator may live in one process, on two
// devices: the second to close must not close what has got the same number since.
struct OpenRoots {
  std::mutex mutex;
  std::set<std::uint64_t> identities;
};

OpenRoots& open_roots() {
  static auto* roots = new OpenRoots;
  return *roots;
}

}  // namespace

std::optional<RootInfo> RootInfo::create() {
  static std::atomic<int> number{0};
  RootInfo root{getpid(), memfd_create("ascend-sim-hccl", MFD_CLOEXEC), 0, ""};
  const bool identified = getrandom(&root.identity, sizeof root.identity, 0) == sizeof root.identity;
  if (root.descriptor < 0 || !identified || ftruncate(root.descriptor, first_page_bytes) != 0 ||
      pwrite(root.descriptor, &root.identity, sizeof root.identity, offsetof(Header, identity)) < 0) {
    print(std::string("HcclGetRootInfo: ") + strerror(errno));
    if (root.descriptor >= 0) ::close(root.descriptor);
    return std::nullopt;
  }
  root.name = "unnamed_" + std::to_string(root.pid) + "_" + std::to_string(number++);
  const std::lock_guard lock(open_roots().mutex);
  open_roots().identities.insert(root.identity);
  return root;
}

void RootInfo::write(HcclRootInfo* bytes) const {
  std::memset(bytes, 0, sizeof *bytes);
  std::snprintf(bytes->internal, sizeof bytes->internal, "ascend-sim %d %d %" PRIu64 " %s", pid, descriptor,
                identity, name.c_str());
}

std::optional<RootInfo> RootInfo::read(const HcclRootInfo& bytes) {
  RootInfo root{};
  char name[64] = "";
  if (std::sscanf(bytes.internal, "ascend-sim %d %d %" SCNu64 " %63s", &root.pid, &root.descriptor,
                  &root.identity, name) != 4) {
    print("a root info that the simulated HcclGetRootInfo has not made");
    return std::nullopt;
  }
  root.name = name;
  return root;
}

std::string RootInfo::path() const {
  return "/proc/" + std::to_string(pid) + "/fd/" + std::to_string(descriptor);
}

void RootInfo::close() const {
  if (pid != getpid()) return;
  const std::lock_guard lock(open_roots().mutex);
  if (open_roots().identities.erase(identity) == 1) ::close(descriptor);
}

}  // namespace sim::hccl
