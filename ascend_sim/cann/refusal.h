// What CANN refuses with an error code: the caller gets the code, and the sentence when it asks for it.
#pragma once

#include <acl/acl_base.h>

#include <string>

// Not in the headers of torch_npu 2.10.0.
#ifndef ACL_ERROR_RT_MODEL_RUNNING
#define ACL_ERROR_RT_MODEL_RUNNING 107037
#endif
#ifndef ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD
#define ACL_ERROR_RT_STREAM_CAPTURE_WRONG_THREAD 107038
#endif
#ifndef ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC
#define ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC 107041
#endif

namespace sim {

// An error code of CANN with its name: {ACL_ERROR_RT_STREAM_CAPTURED, "ACL_ERROR_RT_STREAM_CAPTURED"}.
struct ErrorCode {
  aclError code;
  const char* name;
};
#define ERROR_CODE(code) (::sim::ErrorCode{code, #code})

// Returns the code. aclGetRecentErrMsg returns the sentence to the same thread, once, and torch_npu makes it
// part of the message of its exception.
aclError refuse(ErrorCode error, const std::string& sentence);

}  // namespace sim
