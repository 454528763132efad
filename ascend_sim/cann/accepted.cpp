// Calls that succeed although nothing is done, each with the reason why that is right in a simulation. A call
// that is not here and not simulated elsewhere aborts with its name.
#include <acl/acl.h>
#include <acl/acl_op_compiler.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

std::mutex options_mutex;
std::map<aclSysParamOpt, int64_t> options;

}  // namespace

extern "C" {

// Versions. torch_npu turns features on by the version of CANN; this one has all that it knows.
aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, "8.5.0");
  return ACL_SUCCESS;
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion* version) {
  *version = {};
  std::strcpy(version->version, "8.5.0");
  std::strcpy(version->majorVersion, "8");
  std::strcpy(version->minorVersion, "5");
  std::strcpy(version->releaseVersion, "0");
  return ACL_SUCCESS;
}

// What the compiler of operators can do. It can do bfloat16 and infinities because the CPU can. Nothing is
// compiled just in time, because nothing is compiled.
aclError aclGetCannAttributeList(const aclCannAttr** list, size_t* count) {
  static const aclCannAttr known[] = {ACL_CANN_ATTR_INF_NAN, ACL_CANN_ATTR_BF16, ACL_CANN_ATTR_JIT_COMPILE};
  *list = known;
  *count = sizeof known / sizeof known[0];
  return ACL_SUCCESS;
}

aclError aclGetCannAttribute(aclCannAttr attribute, int32_t* value) {
  *value = attribute == ACL_CANN_ATTR_JIT_COMPILE ? 0 : 1;
  return ACL_SUCCESS;
}

// Options of the compiler of operators, which is never called.
aclError aclSetCompileopt(aclCompileOpt, const char*) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 1; }
aclError aclGetCompileopt(aclCompileOpt, char* value, size_t room) {
  if (room > 0) *value = '\0';
  return ACL_SUCCESS;
}

// Time limits of kernels. Kernels are functions of the CPU that end; HCCL has its own limits, which are
// simulated.
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t wanted, uint64_t* actual) {
  *actual = wanted;
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }

// Determinism of kernels and what they do at overflow: they do what the CPU does.
// torch_npu reads the options back and compares, so they are kept.
aclError aclrtSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  const std::lock_guard lock(options_mutex);
  options[option] = value;
  return ACL_SUCCESS;
}
aclError aclrtGetSysParamOpt(aclSysParamOpt option, int64_t* value) {
  const std::lock_guard lock(options_mutex);
  *value = options[option];
  return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt option, int64_t value) {
  return aclrtSetSysParamOpt(option, value);
}
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }

// What a stream does after a failed task: every stream here stops, which is the mode that torch_npu asks for.
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t mode) {
  return mode == ACL_STOP_ON_FAILURE ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM;
}

// Attributes of a stream for the profiler and for failures; torch_npu sets "cache the information of operators"
// around a capture, for the profiler to show shapes in a replay.
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr attribute, aclrtStreamAttrValue*) {
  constexpr int cache_op_info = 4;  // spelt differently by the headers of torch_npu 2.10.0
  return attribute == cache_op_info ? ACL_SUCCESS : ACL_ERROR_INVALID_PARAM;
}

// All devices are memory of the same machine.
aclError aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return ACL_SUCCESS;
}
aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

// How busy a device is: nobody measures it.
aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo* rates) {
  std::memset(rates, 0, sizeof *rates);
  return ACL_SUCCESS;
}

// Errors are returned by the calls that meet them; there is no error of the thread to look up or to clear.
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

// torch_npu's log. CANN writes it to files, or to the terminal if this variable of its own says so.
void aclAppLog(aclLogLevel level, const char* function, const char* file, uint32_t line, const char* format,
               ...) {
  static const char* const to_terminal = std::getenv("ASCEND_SLOG_PRINT_TO_STDOUT");
  if (to_terminal == nullptr || std::strcmp(to_terminal, "1") != 0) return;
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "torch_npu log level %d, %s, %s:%u: %s\n", level, function, file, line, text);
}

}  // extern "C"
