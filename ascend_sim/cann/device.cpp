#include "device.h"

#include <acl/acl_rt.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

#include "process.h"
#include "sim.h"

namespace sim {
namespace {

constexpr int no_device = -1;
thread_local int device_of_this_thread = no_device;

// Those of the Ascend 910B3, because something has to be said. Nothing here has as many.
constexpr std::int64_t cube_cores = 20, vector_cores = 40, ai_cpus = 6, cache_bytes = 192 << 20;

// A context is the use of one device by this process, so its handle is the number of the device, plus one.
aclrtContext context_of(int device) {
  return reinterpret_cast<aclrtContext>(static_cast<std::intptr_t>(device) + 1);
}

int device_of(aclrtContext context) { return static_cast<int>(reinterpret_cast<std::intptr_t>(context)) - 1; }

bool exists(int device) { return 0 <= device && device < device_count(); }

}  // namespace

int device_count() {
  static const int count = static_cast<int>(setting("ASCEND_SIM_DEVICES", 1));
  return count;
}

std::size_t device_bytes() {
  static const auto bytes = static_cast<std::size_t>(setting("ASCEND_SIM_MEMORY_MB", 4096)) << 20;
  return bytes;
}

void use_device(int device) { device_of_this_thread = device; }

int current_device() { return device_of_this_thread == no_device ? 0 : device_of_this_thread; }

}  // namespace sim

extern "C" {

aclError aclInit(const char*) {
  sim::begin_process();
  return ACL_SUCCESS;
}

aclError aclFinalize() {
  sim::end_process();
  return ACL_SUCCESS;
}

// torch_npu takes another path for each family of devices; this is the one that people have.
const char* aclrtGetSocName() { return "Ascend910B3"; }

aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = sim::device_count();
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t device) {
  sim::begin_process();
  if (!sim::exists(device)) return ACL_ERROR_RT_INVALID_DEVICEID;
  sim::use_device(device);
  return ACL_SUCCESS;
}

// Its streams and its memory go with the process.
aclError aclrtResetDevice(int32_t device) {
  return sim::exists(device) ? ACL_SUCCESS : ACL_ERROR_RT_INVALID_DEVICEID;
}

aclError aclrtGetDevice(int32_t* device) {
  if (sim::device_of_this_thread == sim::no_device) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = sim::device_of_this_thread;
  return ACL_SUCCESS;
}

aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (sim::device_of_this_thread == sim::no_device) return ACL_ERROR_RT_CONTEXT_NULL;
  *context = sim::context_of(sim::device_of_this_thread);
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
  if (!sim::exists(sim::device_of(context))) return ACL_ERROR_RT_CONTEXT_NULL;
  sim::use_device(sim::device_of(context));
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  if (!sim::exists(device)) return ACL_ERROR_RT_INVALID_DEVICEID;
  if (flags != nullptr) *flags = 0;
  *active = 1;
  return ACL_SUCCESS;
}

aclError aclrtGetRunMode(aclrtRunMode* mode) {
  *mode = ACL_HOST;
  return ACL_SUCCESS;
}

// Devices are numbered as the program sees them.
aclError aclrtGetLogicDevIdByUserDevId(const int32_t device, int32_t* const logical) {
  *logical = device;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid* uuid) {
  static const char prefix[] = "simulated";
  std::memset(uuid, 0, sizeof *uuid);
  std::memcpy(uuid->bytes, prefix, sizeof prefix - 1);
  uuid->bytes[sizeof uuid->bytes - 1] = static_cast<char>(device);
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM: *value = sim::ai_cpus; return ACL_SUCCESS;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = sim::cube_cores; return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = sim::vector_cores; return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = sim::device_bytes(); return ACL_SUCCESS;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = sim::cache_bytes; return ACL_SUCCESS;
    default: return ACL_ERROR_INVALID_PARAM;
  }
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t* value) {
  switch (info) {
    case ACL_DEVICE_INFO_AI_CORE_NUM: *value = sim::cube_cores; return ACL_SUCCESS;
    case ACL_DEVICE_INFO_VECTOR_CORE_NUM: *value = sim::vector_cores; return ACL_SUCCESS;
    case ACL_DEVICE_INFO_L2_SIZE: *value = sim::cache_bytes; return ACL_SUCCESS;
    default: return ACL_ERROR_INVALID_PARAM;
  }
}

aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t* value) {
  *value = type == ACL_RT_DEV_RES_CUBE_CORE ? sim::cube_cores : sim::vector_cores;
  return ACL_SUCCESS;
}

aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) {
  return aclrtGetDeviceResLimit(0, type, value);
}

aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  return aclrtGetDeviceResLimit(0, type, value);
}

}  // extern "C"
