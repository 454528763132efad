// Memory of the devices, and host memory that they may read and write while the host does something else.
#include <acl/acl_rt.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>

#include "capture.h"
#include "device.h"
#include "sim.h"
#include "stream.h"

#ifndef ACL_ERROR_HOST_MEMORY_NOT_REGISTERED  // by the headers of torch_npu 2.10.0
#define ACL_ERROR_HOST_MEMORY_NOT_REGISTERED 507911
#endif

namespace sim {
namespace {

constexpr std::size_t alignment = 512;  // as CANN promises
constexpr int poison = 0xFF;  // not a number in every floating point format, and -1 in every integer

enum class Place { device, pinned };

struct Block {
  std::size_t bytes;
  Place place;
  int device;
};

// With poison: how much freed memory stays as it is, poisoned. A graph has nothing but addresses: what still uses
// one is to read poison, and not to destroy what the host has put there.
constexpr std::size_t quarantine_bytes = std::size_t{128} << 20;

// Never freed: streams may still run while the process exits.
struct Memory {
  std::mutex mutex;
  std::deque<std::pair<void*, std::size_t>> quarantine;  // the oldest first
  std::size_t bytes_in_quarantine = 0;
  std::map<const char*, Block> blocks;
  std::map<int, std::size_t> bytes_of_device;

  static Memory& all() {
    static auto* memory = new Memory;
    return *memory;
  }

  // The block that an address lies in, if any.
  const Block* find(const void* address) const {
    auto after = blocks.upper_bound(static_cast<const char*>(address));
    if (after == blocks.begin()) return nullptr;
    const auto& [begin, block] = *std::prev(after);
    return static_cast<const char*>(address) < begin + block.bytes ? &block : nullptr;
  }

  void poison_and_keep(void* address, std::size_t bytes) {
    std::memset(address, poison, bytes);
    quarantine.emplace_back(address, bytes);
    bytes_in_quarantine += bytes;
    while (bytes_in_quarantine > quarantine_bytes) {
      const auto [oldest, size] = quarantine.front();
      quarantine.pop_front();
      bytes_in_quarantine -= size;
      std::free(oldest);
    }
  }

  bool forget(const void* address, Place place) {
    const auto found = blocks.find(static_cast<const char*>(address));
    if (found == blocks.end() || found->second.place != place) return false;
    blocks.erase(found);
    return true;
  }
};

bool poisoning() {
  static const bool on = setting("ASCEND_SIM_POISON", 0) != 0;
  return on;
}

aclError allocate(void** address, std::size_t bytes, Place place) {
  if (bytes == 0) return ACL_ERROR_INVALID_PARAM;
  const int device = current_device();
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  std::size_t& taken = memory.bytes_of_device[device];
  if (place == Place::device && taken + bytes > device_bytes()) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  if (posix_memalign(address, alignment, bytes) != 0) return ACL_ERROR_BAD_ALLOC;
  memory.blocks[static_cast<char*>(*address)] = {bytes, place, device};
  if (place == Place::device) {
    taken += bytes;
    if (poisoning()) std::memset(*address, poison, bytes);
  }
  return ACL_SUCCESS;
}

bool device_can_reach(const void* address) {
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  return memory.find(address) != nullptr;
}

const char* name_of(aclrtMemcpyKind kind) {
  switch (kind) {
    case ACL_MEMCPY_HOST_TO_HOST: return "memcpy H2H";
    case ACL_MEMCPY_HOST_TO_DEVICE: return "memcpy H2D";
    case ACL_MEMCPY_DEVICE_TO_HOST: return "memcpy D2H";
    case ACL_MEMCPY_DEVICE_TO_DEVICE: return "memcpy D2D";
    default: return "memcpy";
  }
}

}  // namespace
}  // namespace sim

using sim::Memory;
using sim::Place;

namespace {

template <class Device>
Device device_of(aclError (*)(Device, aclrtMemUsageInfo*, size_t, size_t*));
using DeviceNumber = decltype(device_of(aclrtGetMemUsageInfo));  // unsigned for torch_npu 2.10.0, signed later

}  // namespace

extern "C" {

aclError aclrtMalloc(void** address, size_t bytes, aclrtMemMallocPolicy) {
  return sim::allocate(address, bytes, Place::device);
}

aclError aclrtMallocAlign32(void** address, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(address, bytes, policy);
}

aclError aclrtMallocHost(void** address, size_t bytes) {
  return sim::allocate(address, bytes, Place::pinned);
}

aclError aclrtMallocHostWithCfg(void** address, uint64_t bytes, aclrtMallocConfig*) {
  return aclrtMallocHost(address, bytes);
}

aclError aclrtFree(void* address) {
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  const sim::Block* block = memory.find(address);
  if (block == nullptr || block->place != Place::device) return ACL_ERROR_INVALID_PARAM;
  const sim::Block freed = *block;
  if (!memory.forget(address, Place::device)) return ACL_ERROR_INVALID_PARAM;
  memory.bytes_of_device[freed.device] -= freed.bytes;
  if (sim::poisoning()) {
    memory.poison_and_keep(address, freed.bytes);
  } else {
    std::free(address);
  }
  return ACL_SUCCESS;
}

aclError aclrtFreeHost(void* address) {
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  if (!memory.forget(address, Place::pinned)) return ACL_ERROR_INVALID_PARAM;
  std::free(address);
  return ACL_SUCCESS;
}

aclError aclrtHostRegisterV2(void* address, uint64_t bytes, uint32_t) {
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  memory.blocks[static_cast<char*>(address)] = {bytes, Place::pinned, 0};
  return ACL_SUCCESS;
}

aclError aclrtHostRegister(void* address, uint64_t bytes, aclrtHostRegisterType, void** on_device) {
  *on_device = address;
  return aclrtHostRegisterV2(address, bytes, 0);
}

aclError aclrtHostUnregister(void* address) {
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  return memory.forget(address, Place::pinned) ? ACL_SUCCESS : ACL_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
  *attributes = {};
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  const sim::Block* block = memory.find(address);
  if (block == nullptr) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
    return ACL_SUCCESS;
  }
  attributes->location.id = block->device;
  attributes->location.type =
      block->place == Place::device ? ACL_MEM_LOCATION_TYPE_DEVICE : ACL_MEM_LOCATION_TYPE_HOST;
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  Memory& memory = Memory::all();
  const std::lock_guard lock(memory.mutex);
  *total = sim::device_bytes();
  *free = *total - memory.bytes_of_device[sim::current_device()];
  return ACL_SUCCESS;
}

// Which component of CANN uses how much: none uses any.
aclError aclrtGetMemUsageInfo(DeviceNumber, aclrtMemUsageInfo*, size_t, size_t* count) {
  *count = 0;
  return ACL_SUCCESS;
}

// As in CANN, in no order with what streams do.
aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  if (const aclError error = sim::refuse_by_mode("aclrtMemcpy")) return error;
  std::memcpy(to, from, bytes);
  return ACL_SUCCESS;
}

// The copy reads and writes when it runs on the stream. If its memory is not pinned, the host stands still
// until then; a capture cannot record such a copy, and where it does not refuse it, it is made at once.
aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                          aclrtStream stream) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  const bool pinned = sim::device_can_reach(to) && sim::device_can_reach(from);
  const auto copying = sim::Stream::find(stream);
  if (!pinned && sim::is_capturing(*copying)) {
    if (const aclError error = sim::refuse_by_mode("aclrtMemcpyAsync", true)) return error;
    std::memcpy(to, from, bytes);
    return ACL_SUCCESS;
  }
  const auto number = sim::enqueue(stream, {sim::name_of(kind), [=] { std::memcpy(to, from, bytes); }});
  if (pinned) return ACL_SUCCESS;
  const std::string name = std::to_string(copying->id);
  return copying->wait_for(number, "a copy of memory that is not pinned, on stream " + name);
}

aclError aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  if (const aclError error = sim::refuse_by_mode("aclrtMemset")) return error;
  std::memset(to, value, bytes);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  sim::enqueue(stream, {"memset", [=] { std::memset(to, value, bytes); }});
  return ACL_SUCCESS;
}

}  // extern "C"
