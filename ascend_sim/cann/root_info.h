// How the members of a communicator find each other: what HcclGetRootInfo hands out.
//
// It leads to a memfd of the process that called HcclGetRootInfo. The other members open it through /proc,
// and that process closes it when its own member has joined or has given up. Nothing is ever in a directory.
#pragma once

#include <hccl/hccl.h>

#include <cstdint>
#include <optional>
#include <string>

namespace sim::hccl {

struct RootInfo {
  int pid;
  int descriptor;
  std::uint64_t identity;  // tells this memfd from what has the same pid and number later
  std::string name;        // for a communicator whose members give it none

  // A new memfd, of one page that begins with the identity. Nothing, and a printed sentence, if it fails.
  static std::optional<RootInfo> create();

  static std::optional<RootInfo> read(const HcclRootInfo& bytes);
  void write(HcclRootInfo* bytes) const;

  std::string path() const;
  void close() const;  // nothing to do in any other process than the creating one
};

}  // namespace sim::hccl
