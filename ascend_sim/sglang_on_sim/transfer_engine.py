"""In the place of memfabric_hybrid, the engine under `--disaggregation-transfer-backend ascend`, which wants
Ascend's driver: it copies memory between two processes of this machine.

As the real one it knows nothing of streams: it reads and writes at once, memory that was registered only.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

OK, FAILED = 0, -1
PIECES = 512  # pieces of memory that the kernel takes in one call at most: UIO_MAXIOV is 1024


class Piece(ctypes.Structure):
    """iovec of the C library."""

    _fields_ = (("begin", ctypes.c_void_p), ("length", ctypes.c_size_t))


class TransferEngine:
    """As far as SGLang calls it; a session is "address:port", the port a number of this process alone."""

    TransDataOpType = SimpleNamespace(SDMA="sdma", DEVICE_RDMA="device_rdma")

    def __init__(self) -> None:
        self._port = socket.socket()
        self._port.bind(("127.0.0.1", 0))  # reserves the number
        self._name = socket.socket(socket.AF_UNIX)
        self._name.bind(_socket_name(self.get_rpc_port()))
        self._name.listen()  # accept is never called: a connection alone tells the peer's process id
        self._registered: list[tuple[int, int]] = []
        self._processes: dict[str, int] = {}

    def get_rpc_port(self) -> int:
        port: int = self._port.getsockname()[1]
        return port

    def initialize(self, store_url: str | None, session_id: str, role: str, npu_id: int, op_type: str) -> int:
        return OK

    def batch_register_memory(self, addresses: Sequence[int], lengths: Sequence[int]) -> int:
        self._registered += list(zip(addresses, lengths, strict=True))
        return OK

    def batch_transfer_sync_write(
        self, session_id: str, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]
    ) -> int:
        """Copy from memory of this process, which is registered, to addresses of the session's process."""
        if not all(map(self._is_registered, sources, lengths)):
            return FAILED
        try:
            process = self._process_of(session_id)
        except OSError:
            return FAILED
        for begin in range(0, len(sources), PIECES):
            part = slice(begin, begin + PIECES)
            if not _write(process, sources[part], targets[part], lengths[part]):
                return FAILED
        return OK

    def _is_registered(self, source: int, length: int) -> bool:
        return any(begin <= source and source + length <= begin + size for begin, size in self._registered)

    def _process_of(self, session_id: str) -> int:
        if session_id not in self._processes:
            port = int(session_id.rpartition(":")[2])
            with socket.socket(socket.AF_UNIX) as peer:
                peer.connect(_socket_name(port))
                found = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            self._processes[session_id] = struct.unpack("3i", found)[0]
        return self._processes[session_id]


def _socket_name(port: int) -> str:
    return f"\0ascend_sim.transfer_engine.{port}"  # abstract: no file is left behind


def _write(process: int, sources: Sequence[int], targets: Sequence[int], lengths: Sequence[int]) -> bool:
    here, there = (
        (Piece * len(lengths))(*(Piece(*each) for each in zip(addresses, lengths, strict=True)))
        for addresses in (sources, targets)
    )
    write = ctypes.CDLL(None, use_errno=True).process_vm_writev
    write.restype = ctypes.c_ssize_t
    written: int = write(process, here, len(here), there, len(there), ctypes.c_ulong(0))
    return written == sum(lengths)


def create_config_store(url: str | None) -> int:
    """Where sessions find each other; here a session's port says it."""
    return OK


PACKAGE_KERNELS: Mapping[str, Any] = {
    "memfabric_hybrid.TransferEngine": TransferEngine,
    "memfabric_hybrid.create_config_store": create_config_store,
}
