#include "communicator_memory.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>

namespace sim::hccl {
namespace {

// Everything starts on a page of its own, so that what is not used takes no memory.
constexpr std::size_t page = first_page_bytes;

constexpr std::size_t whole_pages(std::size_t bytes) { return (bytes + page - 1) / page * page; }

std::size_t boards_offset(std::uint32_t size) { return whole_pages(sizeof(Header) + sizeof(Member) * size); }

std::size_t channels_offset(std::uint32_t size) {
  return boards_offset(size) + whole_pages(sizeof(Board)) * size;
}

std::size_t total_bytes(std::uint32_t size) {
  return channels_offset(size) + whole_pages(sizeof(Channel)) * size * size;
}

// What is wrong with the memfd, or nothing. The first member to ask decides how many there are.
std::string disagreement(int descriptor, const RootInfo& root, std::uint32_t size) {
  void* first_page = mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  if (first_page == MAP_FAILED) return strerror(errno);
  Header& header = *static_cast<Header*>(first_page);
  std::string problem;
  std::uint32_t agreed = 0;
  if (header.identity.load() != root.identity) {
    problem = "its root has ended, its memfd is something else by now";
  } else if (!header.size.compare_exchange_strong(agreed, size) && agreed != size) {
    problem = "one member says that it has " + std::to_string(agreed) + " members, another one says " +
              std::to_string(size);
  }
  munmap(first_page, page);
  return problem;
}

}  // namespace

void print(const std::string& sentence) {
  const std::string line = "[simulated Ascend, pid " + std::to_string(getpid()) + "] " + sentence + "\n";
  if (::write(STDERR_FILENO, line.data(), line.size()) < 0) return;  // nowhere to say it
}

void Bell::ring() {
  rings_.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, &rings_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Bell::sleep(std::uint32_t heard, std::chrono::nanoseconds limit) {
  const auto nanoseconds = std::max<std::int64_t>(limit.count(), 0);
  const timespec timeout{nanoseconds / 1000000000, nanoseconds % 1000000000};
  syscall(SYS_futex, &rings_, FUTEX_WAIT, heard, &timeout, nullptr, 0);
}

std::size_t Channel::write(const char* data, std::size_t bytes) {
  const std::uint64_t written = sender.bytes.load(std::memory_order_relaxed);
  const std::uint64_t read = receiver.bytes.load(std::memory_order_acquire);
  bytes = std::min<std::size_t>(bytes, channel_bytes - (written - read));
  const std::size_t at = written % channel_bytes;
  const std::size_t before_the_end = std::min(bytes, channel_bytes - at);
  std::memcpy(ring + at, data, before_the_end);
  std::memcpy(ring, data + before_the_end, bytes - before_the_end);
  sender.bytes.store(written + bytes, std::memory_order_release);
  return bytes;
}

std::size_t Channel::readable() const {
  return sender.bytes.load(std::memory_order_acquire) - receiver.bytes.load(std::memory_order_relaxed);
}

std::size_t Channel::read(char* data, std::size_t bytes) {
  bytes = std::min(bytes, readable());
  const std::uint64_t read = receiver.bytes.load(std::memory_order_relaxed);
  const std::size_t at = read % channel_bytes;
  const std::size_t before_the_end = std::min(bytes, channel_bytes - at);
  std::memcpy(data, ring + at, before_the_end);
  std::memcpy(data + before_the_end, ring, bytes - before_the_end);
  receiver.bytes.store(read + bytes, std::memory_order_release);
  return bytes;
}

std::unique_ptr<CommunicatorMemory> CommunicatorMemory::open(const RootInfo& root, std::uint32_t size) {
  const int descriptor = ::open(root.path().c_str(), O_RDWR | O_CLOEXEC);
  std::string obstacle;
  void* base = MAP_FAILED;
  if (descriptor < 0) {
    obstacle =
        "its root, process " + std::to_string(root.pid) + ", has ended or has given up (" + root.path() + ")";
  } else {
    obstacle = disagreement(descriptor, root, size);
  }
  if (obstacle.empty() && ftruncate(descriptor, total_bytes(size)) == 0) {
    base = mmap(nullptr, total_bytes(size), PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
  }
  if (obstacle.empty() && base == MAP_FAILED) obstacle = strerror(errno);
  if (descriptor >= 0) close(descriptor);
  if (!obstacle.empty()) {
    print("communicator " + root.name + ": " + obstacle);
    return nullptr;
  }
  return std::unique_ptr<CommunicatorMemory>(new CommunicatorMemory(static_cast<char*>(base), size));
}

CommunicatorMemory::~CommunicatorMemory() { munmap(base_, total_bytes(size_)); }

Header& CommunicatorMemory::header() { return *reinterpret_cast<Header*>(base_); }

Member& CommunicatorMemory::member(std::uint32_t rank) {
  return reinterpret_cast<Member*>(base_ + sizeof(Header))[rank];
}

Board& CommunicatorMemory::board(std::uint32_t rank) {
  return *reinterpret_cast<Board*>(base_ + boards_offset(size_) + whole_pages(sizeof(Board)) * rank);
}

Channel& CommunicatorMemory::channel(std::uint32_t from, std::uint32_t to) {
  const std::size_t number = std::size_t{from} * size_ + to;
  return *reinterpret_cast<Channel*>(base_ + channels_offset(size_) + whole_pages(sizeof(Channel)) * number);
}

}  // namespace sim::hccl
