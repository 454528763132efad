// How the members of a communicator meet in a collective.
//
// All collectives are made of one exchange: everyone shows its data to everyone, a piece at a time, and each
// member takes what its call asks for. They are matched in the order in which they begin on each member.
//
// A member whose call differs from that of the others (another function, size, data type, reduction or root)
// fails with a sentence that names both, and so do the others. Real HCCL compares nothing: it would hang or
// write wrong memory. A member in a send or receive while others are in a collective is NOT such a
// difference: all of them wait, as on the real thing, for that is a deadlock to be shown.
//
// The links' delays are for messages; collectives take the time of their copies only.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "communicator.h"

namespace sim::hccl {

Collective describe(const char* name, std::uint64_t count, HcclDataType data_type, int reduction = -1,
                    int root = -1);

// How many bytes a member has to show in all, where that is known.
using Expected = std::function<std::optional<std::size_t>(std::uint32_t rank)>;

// What to do with a piece that a member shows; `offset` is where it is in all that this member shows.
using Take =
    std::function<void(std::uint32_t rank, std::size_t offset, const char* piece, std::size_t bytes)>;

// A collective while it runs.
class Meeting {
 public:
  // Waits until no earlier collective of this member is running, on whatever stream.
  Meeting(Operation& operation, const Collective& collective);

  // Not in the destructor: after a collective that was given up, no other one may take its place.
  void end();

  // Shows `bytes` of `data` to all members, and takes from what all of them show, this one included, in the
  // order of ranks. A piece has been shown before the same piece of the others is taken, so `data` may be
  // what is written to.
  void exchange(const void* data, std::size_t bytes, const Expected& expected, const Take& take);

  std::uint32_t rank() const { return communicator_.rank; }
  std::uint32_t size() const { return communicator_.size; }

 private:
  void show(const char* data, std::size_t bytes, std::size_t offset);
  void wait_for(const std::string& what, const std::function<bool(const Board&)>& ready);
  void compare(std::uint32_t other, const Board& board, std::optional<std::size_t> expected_bytes);

  Operation& operation_;
  Communicator& communicator_;
  const Collective collective_;
  Board& own_;
  const std::uint64_t number_;
  std::uint64_t round_ = 0;
};

// Puts a collective on a stream.
HcclResult enqueue_collective(const Collective& collective, HcclComm handle, aclrtStream stream,
                              std::function<void(Meeting&)> run);

}  // namespace sim::hccl
