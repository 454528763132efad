// A communicator as one of its members sees it, and an HCCL operation while it runs on its stream.
#pragma once

#include <hccl/hccl.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "communicator_memory.h"
#include "sim.h"

namespace sim::hccl {

using Clock = std::chrono::steady_clock;

class Communicator {
 public:
  // Joins the members that meet at `root`. The calling thread stands still until all of them have come.
  static HcclResult join(const RootInfo& root, std::uint32_t size, std::uint32_t rank,
                         const HcclCommConfig* config, std::shared_ptr<Communicator>* joined);

  Communicator(std::string name, std::uint32_t rank, std::uint32_t size,
               std::unique_ptr<CommunicatorMemory> memory,
               std::optional<std::chrono::seconds> execution_limit);

  Channel& channel_to(std::uint32_t peer) { return memory_->channel(rank, peer); }
  Channel& channel_from(std::uint32_t peer) { return memory_->channel(peer, rank); }
  Board& board(std::uint32_t of) { return memory_->board(of); }
  Bell& bell() { return memory_->member(rank).bell; }
  void ring(std::uint32_t peer) { memory_->member(peer).bell.ring(); }
  void ring_everyone();

  std::vector<std::uint32_t> others() const;
  std::vector<int> pids(const std::vector<std::uint32_t>& ranks) const;

  // Every member's operations end with this sentence. The first one is kept.
  void fail(const std::string& sentence);
  std::optional<std::string> failure();

  void destroy();
  bool destroyed() const { return destroyed_; }

  const std::string name;
  const std::uint32_t rank, size;
  const std::optional<std::chrono::seconds> execution_limit;  // of each operation; nothing: no limit

  // What HcclGetCommAsyncError says. A time-out is this member's own, a failure is everyone's.
  HcclResult error();
  void time_out() { timed_out_ = true; }

 private:
  bool wait_for_members(int root_pid);
  std::vector<std::uint32_t> missing_members() const;
  Partners partners_to_come(int root_pid, int missing) const;
  bool leave_unless_complete();

  std::unique_ptr<CommunicatorMemory> memory_;
  std::atomic<bool> destroyed_{false}, timed_out_{false};
};

// What an operation cannot go on without.
struct Blocked {
  std::string reason;
  std::vector<std::uint32_t> ranks;  // whose turn it is; empty: only time has to pass
  std::optional<Clock::time_point> until = {};
};

// Thrown where an operation cannot end: the communicator has failed or is destroyed, or the time is up.
struct GivenUp {
  aclError error;
};

// An HCCL call, as it is put on a stream.
struct Call {
  std::string function;              // "HcclSend": the name of its task
  std::string kind;                  // the operation in its `Partners`
  std::string title;                 // "HcclSend to rank 1 of group_name_0", for sentences
  std::vector<std::uint32_t> ranks;  // the members that it needs
};

// A call while it runs on its stream.
class Operation {
 public:
  Operation(Communicator& communicator, const Call& call);

  // Calls `step` again and again until nothing blocks it. In between it sleeps, and the listing shows why.
  void until_unblocked(const std::function<std::optional<Blocked>()>& step);

  // Fails the communicator of all members, and gives up.
  [[noreturn]] void fail(const std::string& sentence);

  Communicator& communicator;
  const Call& call;

 private:
  void give_up_if_hopeless(const std::string& reason);

  const std::optional<Clock::time_point> deadline_;
};

void enqueue_operation(std::shared_ptr<Communicator> communicator, aclrtStream stream, Call call,
                       std::function<void(Operation&)> run);

// The communicator behind a handle; nullptr, and a printed sentence, when there is none.
std::shared_ptr<Communicator> find_communicator(HcclComm handle);

// 0 when the data type is unknown.
std::size_t bytes_of(HcclDataType data_type);

// "ranks 1, 3", "rank 2"
std::string ranks_text(const std::vector<std::uint32_t>& ranks);

}  // namespace sim::hccl
