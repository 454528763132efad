"""HCCL called directly, without torch: all members of a communicator are threads of one process.

For programs that `processes.run_program` starts. The members share a device, each has a
stream and two buffers.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from typing import Any

INT32, FLOAT32 = 2, 4  # HcclDataType
SUM, MAXIMUM = 0, 2  # HcclReduceOp
BUFFER_BYTES = 1 << 20
ROOT_INFO_BYTES = 4108
JOIN_LIMIT_S = 20.0


class Member:
    def __init__(self, rank: int, size: int, root_info: Any) -> None:
        self.rank, self.size = rank, size
        self._acl, self._hccl = ctypes.CDLL("libascendcl.so"), ctypes.CDLL("libhccl.so")
        self._communicator, self._stream = ctypes.c_void_p(), ctypes.c_void_p()
        self.input, self.output = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._acl.aclrtSetDevice(0))
        self._check(self._acl.aclrtCreateStream(ctypes.byref(self._stream)))
        for buffer in (self.input, self.output):
            self._check(self._acl.aclrtMalloc(ctypes.byref(buffer), ctypes.c_size_t(BUFFER_BYTES), 0))
        communicator = ctypes.byref(self._communicator)
        self._check(self._hccl.HcclCommInitRootInfo(size, root_info, rank, communicator))

    def call(self, function: str, *arguments: Any) -> None:
        """With the arguments in front of the communicator and the stream."""
        self._check(self._hccl[function](*arguments, self._communicator, self._stream))

    def send(self, count: int, peer: int) -> None:
        self.call("HcclSend", self.input, ctypes.c_uint64(count), INT32, peer)

    def receive(self, count: int, peer: int) -> None:
        self.call("HcclRecv", self.output, ctypes.c_uint64(count), INT32, peer)

    def all_reduce(self, count: int, data_type: int = INT32, reduction: int = SUM) -> None:
        self.call("HcclAllReduce", self.input, self.output, ctypes.c_uint64(count), data_type, reduction)

    def broadcast(self, count: int, root: int) -> None:
        self.call("HcclBroadcast", self.input, ctypes.c_uint64(count), INT32, root)

    def all_to_all(self, sent: list[int], received: list[int]) -> None:
        starts = _numbers([0] * self.size)
        sending = self.input, _numbers(sent), starts, INT32
        self.call("HcclAlltoAllV", *sending, self.output, _numbers(received), starts, INT32)

    def synchronize(self) -> int:
        """What the stream says when everything has run: an aclError."""
        error: int = self._acl.aclrtSynchronizeStream(self._stream)
        return error

    def async_error(self) -> int:
        error = ctypes.c_int()
        self._check(self._hccl.HcclGetCommAsyncError(self._communicator, ctypes.byref(error)))
        return error.value

    def destroy(self) -> None:
        self._check(self._hccl.HcclCommDestroy(self._communicator))

    @staticmethod
    def _check(result: int) -> None:
        assert result == 0, f"the call returned {result}"


def _numbers(values: list[int]) -> Any:
    return (ctypes.c_uint64 * len(values))(*values)


def members(size: int) -> list[Member]:
    """All members of one communicator. They are made by threads, because each one waits for the others."""
    root_info = ctypes.create_string_buffer(ROOT_INFO_BYTES)
    assert ctypes.CDLL("libhccl.so").HcclGetRootInfo(root_info) == 0
    with ThreadPoolExecutor(size) as threads:
        joining = [threads.submit(Member, rank, size, root_info) for rank in range(size)]
        return [member.result(JOIN_LIMIT_S) for member in joining]
