// The memory that the members of one communicator share.
//
// It is a memfd: it has no name in any directory, and it is gone with the last process that maps it. A member
// may be killed at any moment, so there are no locks in here: every word has a single writer or is changed by
// one atomic operation, and whoever waits for a change sleeps on a `Bell`, never for longer than a moment.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "root_info.h"

namespace sim::hccl {

static_assert(std::atomic<std::uint64_t>::is_always_lock_free,
              "a lock could stay with a process that is killed");

constexpr std::size_t first_page_bytes = 4096;

// Pages that are never written cost nothing, so these are limits rather than what a communicator takes.
constexpr std::size_t board_bytes = 64 << 10;
constexpr std::size_t channel_bytes = 256 << 10;

// Rung whenever its owner, one member of the communicator, may have something new to look at.
class Bell {
 public:
  std::uint32_t heard() const { return rings_.load(std::memory_order_acquire); }
  void ring();
  // Returns at once when the bell was rung after `heard` was read.
  void sleep(std::uint32_t heard, std::chrono::nanoseconds limit);

 private:
  std::atomic<std::uint32_t> rings_;
};

struct Member {
  alignas(64) std::atomic<int> pid;  // 0: has not joined
  Bell bell;
};

// Messages from one member to another, in order, through a ring of bytes.
struct Channel {
  // Written by one process only: the sender or the receiver.
  struct alignas(64) End {
    std::atomic<std::uint64_t> begun;  // calls that have started to run on their stream
    std::atomic<std::uint64_t> ended;
    std::atomic<std::uint64_t> bytes;  // ever written, or ever read
  };
  End sender, receiver;
  char ring[channel_bytes];

  // As many bytes as fit now, or as are there now.
  std::size_t write(const char* data, std::size_t bytes);
  std::size_t read(char* data, std::size_t bytes);
  std::size_t readable() const;
};

// A collective as one member calls it; equal on all members unless the program is wrong.
struct Collective {
  char name[24];
  std::uint64_t count;
  std::int32_t data_type, reduction, root;  // reduction and root: -1 where the call has none
};

// What one member shows to all others in a collective: a piece of its data at a time.
struct Board {
  alignas(64) std::atomic<std::uint64_t> begun;  // collectives of this member that have started to run
  std::atomic<std::uint64_t> ended;
  std::atomic<std::uint64_t> shown;  // pieces put on this board
  std::atomic<std::uint64_t> taken;  // rounds in which this member has taken the pieces of everyone
  Collective collective;
  std::uint64_t bytes;  // how much this member shows in all, in the present exchange
  char piece[board_bytes];
};

// Why the communicator is of no more use to any member.
struct Failure {
  std::atomic<bool> claimed;  // by the member that writes the sentence
  std::atomic<bool> written;
  char sentence[512];
};

struct alignas(64) Header {
  std::atomic<std::uint64_t> identity;
  std::atomic<std::uint32_t> size;    // members; 0 until the first one has come
  std::atomic<std::uint32_t> joined;  // members that are waiting for the others, or all of them
  Failure failure;
};

class CommunicatorMemory {
 public:
  // nullptr, and a printed sentence, when the memory cannot be reached or is that of other members.
  static std::unique_ptr<CommunicatorMemory> open(const RootInfo& root, std::uint32_t size);
  ~CommunicatorMemory();
  CommunicatorMemory(const CommunicatorMemory&) = delete;

  Header& header();
  Member& member(std::uint32_t rank);
  Board& board(std::uint32_t rank);
  Channel& channel(std::uint32_t from, std::uint32_t to);

 private:
  CommunicatorMemory(char* base, std::uint32_t size) : base_(base), size_(size) {}

  char* base_;
  std::uint32_t size_;
};

// One line on stderr, in one piece.
void print(const std::string& sentence);

}  // namespace sim::hccl
