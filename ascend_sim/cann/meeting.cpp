#include "meeting.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "point_to_point.h"

namespace sim::hccl {
namespace {

const char* data_type_text(int data_type) {
  switch (data_type) {
    case HCCL_DATA_TYPE_INT8: return "int8";
    case HCCL_DATA_TYPE_INT16: return "int16";
    case HCCL_DATA_TYPE_INT32: return "int32";
    case HCCL_DATA_TYPE_INT64: return "int64";
    case HCCL_DATA_TYPE_UINT8: return "uint8";
    case HCCL_DATA_TYPE_UINT16: return "uint16";
    case HCCL_DATA_TYPE_UINT32: return "uint32";
    case HCCL_DATA_TYPE_UINT64: return "uint64";
    case HCCL_DATA_TYPE_FP16: return "float16";
    case HCCL_DATA_TYPE_FP32: return "float32";
    case HCCL_DATA_TYPE_FP64: return "float64";
    case HCCL_DATA_TYPE_BFP16: return "bfloat16";
    default: return "elements of another type";
  }
}

const char* reduction_text(int reduction) {
  switch (reduction) {
    case HCCL_REDUCE_SUM: return ", sum";
    case HCCL_REDUCE_PROD: return ", product";
    case HCCL_REDUCE_MAX: return ", maximum";
    case HCCL_REDUCE_MIN: return ", minimum";
    default: return "";
  }
}

std::string text(const Collective& collective) {
  std::string root = collective.root < 0 ? "" : ", root " + std::to_string(collective.root);
  const std::string count = collective.count == 0 ? "" : std::to_string(collective.count) + " ";
  return std::string(collective.name) + " of " + count + data_type_text(collective.data_type) +
         reduction_text(collective.reduction) + root;
}

bool equal(const Collective& one, const Collective& other) {
  return std::strcmp(one.name, other.name) == 0 && one.count == other.count &&
         one.data_type == other.data_type && one.reduction == other.reduction && one.root == other.root;
}

}  // namespace

Collective describe(const char* name, std::uint64_t count, HcclDataType data_type, int reduction, int root) {
  Collective collective{};
  std::strncpy(collective.name, name, sizeof collective.name - 1);
  collective.count = count;
  collective.data_type = data_type;
  collective.reduction = reduction;
  collective.root = root;
  return collective;
}

Meeting::Meeting(Operation& operation, const Collective& collective)
    : operation_(operation),
      communicator_(operation.communicator),
      collective_(collective),
      own_(communicator_.board(communicator_.rank)),
      number_(own_.begun.fetch_add(1)) {
  operation_.until_unblocked([&]() -> std::optional<Blocked> {
    if (own_.ended.load() == number_) return std::nullopt;
    return Blocked{"an earlier collective of this member has not ended", {}};
  });
}

void Meeting::end() {
  own_.ended.store(number_ + 1);
  communicator_.bell().ring();  // for a later collective, on another stream
}

void Meeting::exchange(const void* data, std::size_t bytes, const Expected& expected, const Take& take) {
  std::size_t longest = bytes;
  for (std::size_t offset = 0; offset == 0 || offset < longest; offset += board_bytes) {
    show(static_cast<const char*>(data), bytes, offset);
    wait_for("in it yet", [this](const Board& board) { return board.shown.load() > round_; });
    for (std::uint32_t other = 0; other < size(); ++other) {
      const Board& board = communicator_.board(other);
      compare(other, board, expected(other));
      longest = std::max<std::size_t>(longest, board.bytes);
      if (offset < board.bytes) take(other, offset, board.piece, std::min(board.bytes - offset, board_bytes));
    }
    own_.taken.store(round_ + 1);
    communicator_.ring_everyone();
  }
}

void Meeting::show(const char* data, std::size_t bytes, std::size_t offset) {
  round_ = own_.shown.load();
  wait_for("done with the piece before", [this](const Board& board) { return board.taken.load() >= round_; });
  own_.collective = collective_;
  own_.bytes = bytes;
  if (offset < bytes) std::memcpy(own_.piece, data + offset, std::min(bytes - offset, board_bytes));
  own_.shown.store(round_ + 1);
  communicator_.ring_everyone();
}

void Meeting::wait_for(const std::string& what, const std::function<bool(const Board&)>& ready) {
  operation_.until_unblocked([&]() -> std::optional<Blocked> {
    std::vector<std::uint32_t> missing;
    for (const std::uint32_t other : communicator_.others()) {
      if (!ready(communicator_.board(other))) missing.push_back(other);
    }
    if (missing.empty()) return std::nullopt;
    return Blocked{ranks_text(missing) + " not " + what, missing};
  });
}

void Meeting::compare(std::uint32_t other, const Board& board, std::optional<std::size_t> expected_bytes) {
  const std::string mine = "rank " + std::to_string(rank()) + " of " + communicator_.name;
  const std::string theirs = "rank " + std::to_string(other);
  if (!equal(board.collective, collective_)) {
    operation_.fail(mine + " calls " + text(collective_) + " while " + theirs + " calls " +
                    text(board.collective));
  }
  if (expected_bytes && board.bytes != *expected_bytes) {
    operation_.fail(mine + " expects " + std::to_string(*expected_bytes) + " bytes of " + theirs + " in " +
                    text(collective_) + ", and gets " + std::to_string(board.bytes));
  }
}

HcclResult enqueue_collective(const Collective& collective, HcclComm handle, aclrtStream stream,
                              std::function<void(Meeting&)> run) {
  if (in_group()) not_simulated("a collective between HcclGroupStart and HcclGroupEnd");
  auto communicator = find_communicator(handle);
  if (communicator == nullptr) return HCCL_E_PARA;
  const bool root_exists = collective.root < static_cast<int>(communicator->size);
  if (!root_exists || bytes_of(static_cast<HcclDataType>(collective.data_type)) == 0) {
    print(communicator->name + ": " + text(collective) + ": no such root or data type");
    return HCCL_E_PARA;
  }
  const std::string name = collective.name;
  Call call{name, name, name + " of " + communicator->name, communicator->others()};
  enqueue_operation(std::move(communicator), stream, std::move(call),
                    [collective, run = std::move(run)](Operation& operation) {
                      Meeting meeting(operation, collective);
                      run(meeting);
                      meeting.end();
                    });
  return HCCL_SUCCESS;
}

}  // namespace sim::hccl
