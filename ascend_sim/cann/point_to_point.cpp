// Sends and receives. A send occupies its stream until the matching receive RUNS on the stream of its peer,
// as real HCCL documents it ("synchronous, must be paired"), and until that receive has taken everything. The
// sends of one member to another match the receives there in the order in which they begin, on any streams.
//
// HcclSend and HcclRecv are batches of one. In a batch all items go on together: nothing orders its
// directions, nor its peers; only the messages to (or from) one peer are in the order of the items.
#include "point_to_point.h"

#include <algorithm>
#include <utility>

#include "communicator.h"

namespace sim::hccl {
namespace {

// In front of each message in its channel.
struct MessageHeader {
  std::uint64_t bytes;
};

// One direction of one message; `advance` does what is possible now and says what is in the way of the rest.
class Transfer {
 public:
  virtual ~Transfer() = default;
  virtual std::optional<Blocked> advance() = 0;
};

class Send : public Transfer {
 public:
  Send(Operation& operation, const HcclSendRecvItem& item)
      : communicator_(operation.communicator),
        peer_(item.remoteRank),
        channel_(communicator_.channel_to(peer_)),
        data_(static_cast<const char*>(item.buf)),
        header_{item.count * bytes_of(item.dataType)},
        eager_(fits_eagerly(header_.bytes)),
        number_(channel_.sender.begun.fetch_add(1)) {
    communicator_.ring(peer_);
  }

  std::optional<Blocked> advance() override {
    if (ended_) return std::nullopt;
    if (channel_.sender.ended.load() != number_) return blocked("an earlier send to it has not ended");
    if (!eager_ && channel_.receiver.begun.load(std::memory_order_acquire) <= number_) {
      return blocked("its HcclRecv has not begun");
    }
    if (!departed_) depart();
    if (Clock::now() < arrival_) return Blocked{"the message is on its way", {}, arrival_};
    write();
    if (written_ < sizeof header_ + header_.bytes) return blocked("it has not taken the message yet");
    if (!eager_ && channel_.receiver.ended.load(std::memory_order_acquire) <= number_) {
      return blocked("it has not taken the message yet");
    }
    end();
    return std::nullopt;
  }

 private:
  // What is eager has to find room in the channel: real buffers have an end, too.
  static bool fits_eagerly(std::uint64_t bytes) {
    const long limit = links().eager_bytes.load();
    return limit > 0 && bytes <= static_cast<std::uint64_t>(limit) &&
           bytes + sizeof(MessageHeader) <= channel_bytes;
  }

  Blocked blocked(const std::string& reason) const { return {reason, {peer_}}; }

  void depart() {
    departed_ = true;
    const long mb_per_s = links().mb_per_s.load();
    const auto bytes = static_cast<long>(header_.bytes);
    arrival_ = Clock::now() + std::chrono::microseconds(links().us_per_message.load()) +
               std::chrono::nanoseconds(mb_per_s == 0 ? 0 : bytes * 1000 / mb_per_s);
  }

  void write() {
    const std::size_t before = written_;
    if (written_ < sizeof header_) {
      written_ +=
          channel_.write(reinterpret_cast<const char*>(&header_) + written_, sizeof header_ - written_);
    }
    if (written_ >= sizeof header_) {
      const std::size_t sent = written_ - sizeof header_;
      written_ += channel_.write(data_ + sent, header_.bytes - sent);
    }
    if (written_ > before) communicator_.ring(peer_);
  }

  void end() {
    ended_ = true;
    channel_.sender.ended.store(number_ + 1);
    communicator_.bell().ring();  // for a later send, on another stream
  }

  Communicator& communicator_;
  const std::uint32_t peer_;
  Channel& channel_;
  const char* const data_;
  const MessageHeader header_;
  const bool eager_;
  const std::uint64_t number_;
  bool departed_ = false, ended_ = false;
  Clock::time_point arrival_{};
  std::size_t written_ = 0;  // header included
};

class Receive : public Transfer {
 public:
  Receive(Operation& operation, const HcclSendRecvItem& item)
      : operation_(operation),
        communicator_(operation.communicator),
        peer_(item.remoteRank),
        channel_(communicator_.channel_from(peer_)),
        data_(static_cast<char*>(item.buf)),
        bytes_(item.count * bytes_of(item.dataType)),
        number_(channel_.receiver.begun.fetch_add(1)) {
    communicator_.ring(peer_);
  }

  std::optional<Blocked> advance() override {
    if (ended_) return std::nullopt;
    if (channel_.receiver.ended.load() != number_) return blocked("an earlier receive from it has not ended");
    if (!read_header()) {
      const bool begun = channel_.sender.begun.load(std::memory_order_acquire) > number_;
      return blocked(begun ? "its message has not arrived" : "its HcclSend has not begun");
    }
    read();
    if (taken_ < bytes_) return blocked("its message has not arrived");
    end();
    return std::nullopt;
  }

 private:
  Blocked blocked(const std::string& reason) const { return {reason, {peer_}}; }

  bool read_header() {
    if (header_read_) return true;
    MessageHeader header;
    if (channel_.readable() < sizeof header) return false;
    channel_.read(reinterpret_cast<char*>(&header), sizeof header);
    header_read_ = true;
    if (header.bytes != bytes_) {
      // Real HCCL does not compare the sizes: it would write past the end of the buffer, or hang.
      operation_.fail("message " + std::to_string(number_) + " from rank " + std::to_string(peer_) +
                      " to rank " + std::to_string(communicator_.rank) + " of " + communicator_.name +
                      " is sent with " + std::to_string(header.bytes) + " bytes and received with " +
                      std::to_string(bytes_));
    }
    return true;
  }

  void read() {
    const std::size_t now = channel_.read(data_ + taken_, bytes_ - taken_);
    taken_ += now;
    if (now > 0) communicator_.ring(peer_);
  }

  void end() {
    ended_ = true;
    channel_.receiver.ended.store(number_ + 1, std::memory_order_release);
    communicator_.ring(peer_);
    communicator_.bell().ring();  // for a later receive, on another stream
  }

  Operation& operation_;
  Communicator& communicator_;
  const std::uint32_t peer_;
  Channel& channel_;
  char* const data_;
  const std::size_t bytes_;
  const std::uint64_t number_;
  bool header_read_ = false, ended_ = false;
  std::size_t taken_ = 0;
};

std::string direction_text(const HcclSendRecvItem& item) {
  return (item.sendRecvType == HCCL_SEND ? "to rank " : "from rank ") + std::to_string(item.remoteRank);
}

void add(std::vector<std::uint32_t>& ranks, std::uint32_t rank) {
  if (std::count(ranks.begin(), ranks.end(), rank) == 0) ranks.push_back(rank);
}

Blocked both(Blocked one, const Blocked& other) {
  one.reason += "; " + other.reason;
  for (const std::uint32_t rank : other.ranks) add(one.ranks, rank);
  if (one.until && other.until) one.until = std::min(*one.until, *other.until);
  if (!one.until) one.until = other.until;
  return one;
}

void run_transfers(Operation& operation, const std::vector<HcclSendRecvItem>& items) {
  std::vector<std::unique_ptr<Transfer>> transfers;
  for (const HcclSendRecvItem& item : items) {
    if (item.sendRecvType == HCCL_SEND) {
      transfers.push_back(std::make_unique<Send>(operation, item));
    } else {
      transfers.push_back(std::make_unique<Receive>(operation, item));
    }
  }
  operation.until_unblocked([&]() -> std::optional<Blocked> {
    std::optional<Blocked> all;
    for (std::size_t i = 0; i < items.size(); ++i) {
      auto blocked = transfers[i]->advance();
      if (!blocked) continue;
      if (operation.call.kind == "batch") blocked->reason = direction_text(items[i]) + ": " + blocked->reason;
      all = all ? both(*all, *blocked) : *blocked;
    }
    return all;
  });
}

// Items that transfer nothing are left out, as real HCCL does.
void enqueue_transfers(std::shared_ptr<Communicator> communicator, aclrtStream stream, Call call,
                       std::vector<HcclSendRecvItem> items) {
  items.erase(std::remove_if(items.begin(), items.end(), [](const auto& item) { return item.count == 0; }),
              items.end());
  if (items.empty()) return;
  for (const HcclSendRecvItem& item : items) add(call.ranks, item.remoteRank);
  enqueue_operation(std::move(communicator), stream, std::move(call),
                    [items = std::move(items)](Operation& operation) { run_transfers(operation, items); });
}

void enqueue_batch(std::shared_ptr<Communicator> communicator, aclrtStream stream,
                   std::vector<HcclSendRecvItem> items) {
  Call call{"HcclBatchSendRecv", "batch", "HcclBatchSendRecv of " + communicator->name, {}};
  enqueue_transfers(std::move(communicator), stream, std::move(call), std::move(items));
}

// What a thread has called since its outermost HcclGroupStart: real HCCL runs the sends and receives of a
// group as one batch, on the stream that each was called with.
struct Group {
  struct Part {
    std::shared_ptr<Communicator> communicator;
    aclrtStream stream;
    std::vector<HcclSendRecvItem> items;
  };

  int depth = 0;
  std::vector<Part> parts;

  void add(const std::shared_ptr<Communicator>& communicator, aclrtStream stream,
           const HcclSendRecvItem& item) {
    for (Part& part : parts) {
      if (part.communicator == communicator && part.stream == stream) return part.items.push_back(item);
    }
    parts.push_back(Part{communicator, stream, {item}});
  }
};

thread_local Group group;

bool valid(const Communicator& communicator, const HcclSendRecvItem& item) {
  const bool known_type = item.sendRecvType == HCCL_SEND || item.sendRecvType == HCCL_RECV;
  if (known_type && item.remoteRank < communicator.size && bytes_of(item.dataType) != 0) return true;
  print("a send or receive of " + communicator.name + " with rank " + std::to_string(item.remoteRank) +
        " and data type " + std::to_string(item.dataType) + ": no such thing");
  return false;
}

HcclResult send_or_receive(const char* function, const char* kind, const HcclSendRecvItem& item,
                           HcclComm handle, aclrtStream stream) {
  auto communicator = find_communicator(handle);
  if (communicator == nullptr || !valid(*communicator, item)) return HCCL_E_PARA;
  if (group.depth > 0) {
    group.add(communicator, stream, item);
    return HCCL_SUCCESS;
  }
  if (item.remoteRank == communicator->rank) {
    print(std::string(function) + " of " + communicator->name + " between rank " +
          std::to_string(item.remoteRank) + " and itself");
    return HCCL_E_NOT_SUPPORT;
  }
  const std::string title = std::string(function) + " " + direction_text(item) + " of " + communicator->name;
  Call call{function, kind, title, {}};
  enqueue_transfers(std::move(communicator), stream, std::move(call), {item});
  return HCCL_SUCCESS;
}

}  // namespace

bool in_group() { return group.depth > 0; }

}  // namespace sim::hccl

using namespace sim::hccl;

extern "C" {

HcclResult HcclSend(void* data, uint64_t count, HcclDataType data_type, uint32_t peer, HcclComm handle,
                    aclrtStream stream) {
  return send_or_receive("HcclSend", "send", {HCCL_SEND, data, count, data_type, peer}, handle, stream);
}

HcclResult HcclRecv(void* data, uint64_t count, HcclDataType data_type, uint32_t peer, HcclComm handle,
                    aclrtStream stream) {
  return send_or_receive("HcclRecv", "receive", {HCCL_RECV, data, count, data_type, peer}, handle, stream);
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm handle, aclrtStream stream) {
  if (in_group()) return HCCL_E_NOT_SUPPORT;  // documented
  auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  const std::vector<HcclSendRecvItem> batch(items, items + count);
  for (const HcclSendRecvItem& item : batch) {
    if (!valid(*communicator, item)) return HCCL_E_PARA;
  }
  enqueue_batch(std::move(communicator), stream, batch);
  return HCCL_SUCCESS;
}

HcclResult HcclGroupStart() {
  ++group.depth;
  return HCCL_SUCCESS;
}

HcclResult HcclGroupEnd() {
  if (group.depth == 0) {
    print("HcclGroupEnd without HcclGroupStart");
    return HCCL_E_NOT_SUPPORT;
  }
  if (--group.depth > 0) return HCCL_SUCCESS;
  for (Group::Part& part : std::exchange(group.parts, {})) {
    enqueue_batch(part.communicator, part.stream, std::move(part.items));
  }
  return HCCL_SUCCESS;
}

}  // extern "C"
