"""Whether a connection's peer process runs, not counting our own pauses.

ZeroMQ's heartbeat timeout also runs out while this process is stopped: servers suspended as a whole would
lose their peers. So heartbeats only keep bytes flowing, the kernel measures silence, and time when this
process was not awake is forgiven.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress
from pathlib import Path

import zmq

BEAT_S = 0.1
GAP_S = 0.4  # a thread that comes so late was stopped, or could not have a core or Python's lock
NEVER_MS = 2**31 - 1
_LAST_DATA_RECEIVED = struct.Struct("52xI")  # of struct tcp_info: ms since the last byte came
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: pid, uid, gid


class Pulse:
    """The time since this process last woke up, measured by an otherwise idle thread."""

    def __init__(self) -> None:
        self._awake_since = self._last_beat = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)
        self._thread.start()

    @property
    def awake_s(self) -> float:
        now = time.monotonic()
        if now - self._last_beat > GAP_S:  # behind a pause the caller may be quicker than the thread
            return 0.0
        return now - self._awake_since

    def close(self) -> None:
        self._ended.set()
        self._thread.join(10)

    def _run(self) -> None:
        while not self._ended.wait(BEAT_S):
            now = time.monotonic()
            if now - self._last_beat > GAP_S:
                self._awake_since = now
            self._last_beat = now


def keep_talking(connection: zmq.Socket, timeout_s: float) -> None:
    """Heartbeats, several per `timeout_s`, that never end the connection."""
    connection.setsockopt(zmq.HEARTBEAT_IVL, max(50, int(timeout_s * 1000) // 8))
    connection.setsockopt(zmq.HEARTBEAT_TIMEOUT, NEVER_MS)


class OtherEnd:
    """The peer process of a connection of ours; ZeroMQ owns the descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._stopped_since: float | None = None
        self._pid = 0
        with suppress(OSError):
            if self._family() == socket.AF_UNIX:
                self._pid = _CREDENTIALS.unpack(self._option(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]

    def silent_s(self) -> float:
        """Seconds without a sign of life: over TCP since its last bytes, on this node since it was stopped.

        0 if unknown.
        """
        # Unknown, as while the connection ends: ZeroMQ reports that.
        if self._pid:
            return self._stopped_s()
        with suppress(OSError, struct.error):
            if self._family() in (socket.AF_INET, socket.AF_INET6):
                return (
                    _LAST_DATA_RECEIVED.unpack(self._option(socket.IPPROTO_TCP, socket.TCP_INFO, 56))[0] / 1e3
                )
        return 0.0

    def _stopped_s(self) -> float:
        now = time.monotonic()
        if not _is_stopped(self._pid):
            self._stopped_since = None
            return 0.0
        if self._stopped_since is None:
            self._stopped_since = now
        return now - self._stopped_since

    def _family(self) -> int:
        return int.from_bytes(self._option(socket.SOL_SOCKET, socket.SO_DOMAIN, 4), "little")

    def _option(self, level: int, name: int, length: int) -> bytes:
        # Of the descriptor as it is: a duplicate would keep the connection open.
        borrowed = socket.socket(fileno=self._descriptor)
        try:
            return borrowed.getsockopt(level, name, length)
        finally:
            borrowed.detach()


def _is_stopped(pid: int) -> bool:
    """By a signal or a debugger."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in ("T", "t")
