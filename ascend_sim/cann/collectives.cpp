// The collectives, each as what its members show in an exchange and what they take from it.
#include <cstring>
#include <numeric>

#include "meeting.h"
#include "reduce.h"

namespace sim::hccl {
namespace {

// A buffer with a part for each member, in bytes.
struct Parts {
  std::vector<std::size_t> starts, bytes;
};

std::uint32_t size_of(HcclComm handle) {
  const auto communicator = find_communicator(handle);
  return communicator == nullptr ? 0 : communicator->size;
}

Parts equal_parts(HcclComm handle, std::size_t bytes) {
  Parts parts;
  for (std::uint32_t rank = 0; rank < size_of(handle); ++rank) {
    parts.starts.push_back(rank * bytes);
    parts.bytes.push_back(bytes);
  }
  return parts;
}

// Copied, because the caller's lists may be gone when the collective runs.
Parts listed_parts(HcclComm handle, const void* counts, const void* displacements, HcclDataType data_type) {
  Parts parts;
  for (std::uint32_t rank = 0; rank < size_of(handle); ++rank) {
    parts.starts.push_back(static_cast<const std::uint64_t*>(displacements)[rank] * bytes_of(data_type));
    parts.bytes.push_back(static_cast<const std::uint64_t*>(counts)[rank] * bytes_of(data_type));
  }
  return parts;
}

std::size_t total(const Parts& parts) {
  return std::accumulate(parts.bytes.begin(), parts.bytes.end(), std::size_t{0});
}

Expected from_everyone(std::size_t bytes) {
  return [bytes](std::uint32_t) { return bytes; };
}

Expected from_one(std::uint32_t rank, std::size_t bytes) {
  return [rank, bytes](std::uint32_t other) { return other == rank ? bytes : 0; };
}

Take nothing() {
  return [](std::uint32_t, std::size_t, const char*, std::size_t) {};
}

Take copy_from(std::uint32_t rank, void* output) {
  return [=](std::uint32_t from, std::size_t offset, const char* piece, std::size_t bytes) {
    if (from == rank) std::memcpy(static_cast<char*>(output) + offset, piece, bytes);
  };
}

Take reduce_into(void* output, HcclDataType data_type, HcclReduceOp reduction) {
  return [=](std::uint32_t from, std::size_t offset, const char* piece, std::size_t bytes) {
    char* target = static_cast<char*>(output) + offset;
    if (from == 0) {
      std::memcpy(target, piece, bytes);
    } else {
      reduce(target, piece, bytes / bytes_of(data_type), data_type, reduction);
    }
  };
}

// One exchange for the part of each member, so that nobody needs room for the parts of the others.
void reduce_scatter(Meeting& meeting, const void* input, const Parts& parts, const Take& take) {
  for (std::uint32_t part = 0; part < meeting.size(); ++part) {
    meeting.exchange(static_cast<const char*>(input) + parts.starts[part], parts.bytes[part],
                     from_everyone(parts.bytes[part]), part == meeting.rank() ? take : nothing());
  }
}

// In step n each member shows what is for the n-th member after it, and takes what the n-th before it shows.
void all_to_all(Meeting& meeting, const void* input, const Parts& sent, const void* output,
                const Parts& received) {
  auto* target = static_cast<char*>(const_cast<void*>(output));  // const in the API, and yet what is written
  for (std::uint32_t step = 0; step < meeting.size(); ++step) {
    const std::uint32_t to = (meeting.rank() + step) % meeting.size();
    const std::uint32_t from = (meeting.rank() + meeting.size() - step) % meeting.size();
    const Expected expected = [&](std::uint32_t other) {
      return other == from ? std::optional(received.bytes[from]) : std::nullopt;
    };
    meeting.exchange(static_cast<const char*>(input) + sent.starts[to], sent.bytes[to], expected,
                     copy_from(from, target + received.starts[from]));
  }
}

}  // namespace
}  // namespace sim::hccl

using namespace sim::hccl;

// Where all members have the same number of elements, zero is no collective: real HCCL returns at once.
extern "C" {

HcclResult HcclAllReduce(void* input, void* output, uint64_t count, HcclDataType data_type,
                         HcclReduceOp reduction, HcclComm handle, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  const std::size_t bytes = count * bytes_of(data_type);
  const Collective collective = describe("HcclAllReduce", count, data_type, reduction);
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    meeting.exchange(input, bytes, from_everyone(bytes), reduce_into(output, data_type, reduction));
  });
}

HcclResult HcclReduce(void* input, void* output, uint64_t count, HcclDataType data_type,
                      HcclReduceOp reduction, uint32_t root, HcclComm handle, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  const std::size_t bytes = count * bytes_of(data_type);
  const Collective collective = describe("HcclReduce", count, data_type, reduction, static_cast<int>(root));
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    meeting.exchange(input, bytes, from_everyone(bytes),
                     meeting.rank() == root ? reduce_into(output, data_type, reduction) : nothing());
  });
}

HcclResult HcclReduceScatter(void* input, void* output, uint64_t count, HcclDataType data_type,
                             HcclReduceOp reduction, HcclComm handle, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  const Parts parts = equal_parts(handle, count * bytes_of(data_type));
  const Collective collective = describe("HcclReduceScatter", count, data_type, reduction);
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    reduce_scatter(meeting, input, parts, reduce_into(output, data_type, reduction));
  });
}

HcclResult HcclReduceScatterV(void* input, const void* counts, const void* displacements, void* output,
                              uint64_t count, HcclDataType data_type, HcclReduceOp reduction, HcclComm handle,
                              aclrtStream stream) {
  const auto communicator = find_communicator(handle);
  if (communicator == nullptr || static_cast<const std::uint64_t*>(counts)[communicator->rank] != count) {
    return HCCL_E_PARA;
  }
  const Parts parts = listed_parts(handle, counts, displacements, data_type);
  const std::uint64_t all = total(parts) / bytes_of(data_type);
  const Collective collective = describe("HcclReduceScatterV", all, data_type, reduction);
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    reduce_scatter(meeting, input, parts, reduce_into(output, data_type, reduction));
  });
}

HcclResult HcclAllGather(void* input, void* output, uint64_t count, HcclDataType data_type, HcclComm handle,
                         aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  const std::size_t bytes = count * bytes_of(data_type);
  return enqueue_collective(
      describe("HcclAllGather", count, data_type), handle, stream, [=](Meeting& meeting) {
        meeting.exchange(input, bytes, from_everyone(bytes),
                         [=](std::uint32_t from, std::size_t offset, const char* piece, std::size_t taken) {
                           std::memcpy(static_cast<char*>(output) + from * bytes + offset, piece, taken);
                         });
      });
}

HcclResult HcclAllGatherV(void* input, uint64_t count, void* output, const void* counts,
                          const void* displacements, HcclDataType data_type, HcclComm handle,
                          aclrtStream stream) {
  const Parts parts = listed_parts(handle, counts, displacements, data_type);
  const std::uint64_t all = total(parts) / bytes_of(data_type);
  const Collective collective = describe("HcclAllGatherV", all, data_type);
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    meeting.exchange(
        input, count * bytes_of(data_type), [&](std::uint32_t other) { return parts.bytes[other]; },
        [&](std::uint32_t from, std::size_t offset, const char* piece, std::size_t taken) {
          std::memcpy(static_cast<char*>(output) + parts.starts[from] + offset, piece, taken);
        });
  });
}

HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType data_type, uint32_t root, HcclComm handle,
                         aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  const std::size_t bytes = count * bytes_of(data_type);
  const Collective collective = describe("HcclBroadcast", count, data_type, -1, static_cast<int>(root));
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    const bool is_root = meeting.rank() == root;
    meeting.exchange(data, is_root ? bytes : 0, from_one(root, bytes),
                     is_root ? nothing() : copy_from(root, data));
  });
}

HcclResult HcclScatter(void* input, void* output, uint64_t count, HcclDataType data_type, uint32_t root,
                       HcclComm handle, aclrtStream stream) {
  if (count == 0) return HCCL_SUCCESS;
  const std::size_t bytes = count * bytes_of(data_type);
  const Collective collective = describe("HcclScatter", count, data_type, -1, static_cast<int>(root));
  return enqueue_collective(collective, handle, stream, [=](Meeting& meeting) {
    const bool is_root = meeting.rank() == root;  // `input` is nothing on the others
    for (std::uint32_t part = 0; part < meeting.size(); ++part) {
      meeting.exchange(is_root ? static_cast<const char*>(input) + part * bytes : nullptr,
                       is_root ? bytes : 0, from_one(root, bytes),
                       part == meeting.rank() ? copy_from(root, output) : nothing());
    }
  });
}

HcclResult HcclAlltoAll(const void* input, uint64_t send_count, HcclDataType send_type, const void* output,
                        uint64_t receive_count, HcclDataType receive_type, HcclComm handle,
                        aclrtStream stream) {
  if (send_count == 0 && receive_count == 0) return HCCL_SUCCESS;
  const Parts sent = equal_parts(handle, send_count * bytes_of(send_type));
  const Parts received = equal_parts(handle, receive_count * bytes_of(receive_type));
  const Collective collective = describe("HcclAlltoAll", send_count, send_type);
  return enqueue_collective(collective, handle, stream,
                            [=](Meeting& meeting) { all_to_all(meeting, input, sent, output, received); });
}

HcclResult HcclAlltoAllV(const void* input, const void* send_counts, const void* send_displacements,
                         HcclDataType send_type, const void* output, const void* receive_counts,
                         const void* receive_displacements, HcclDataType receive_type, HcclComm handle,
                         aclrtStream stream) {
  const Parts sent = listed_parts(handle, send_counts, send_displacements, send_type);
  const Parts received = listed_parts(handle, receive_counts, receive_displacements, receive_type);
  const Collective collective = describe("HcclAlltoAllV", 0, send_type);  // the counts differ between members
  return enqueue_collective(collective, handle, stream,
                            [=](Meeting& meeting) { all_to_all(meeting, input, sent, output, received); });
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
  return enqueue_collective(
      describe("HcclBarrier", 0, HCCL_DATA_TYPE_INT8), handle, stream,
      [](Meeting& meeting) { meeting.exchange(nullptr, 0, from_everyone(0), nothing()); });
}

}  // extern "C"
