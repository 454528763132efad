"""Counts refused connections to a TCP socket."""

from __future__ import annotations

import threading
from collections import Counter

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..observe.telemetry import Telemetry
from .monitor import open_monitor

HANDSHAKE_LIMIT_MS = 10_000  # who has not shown its key by then is disconnected; ranks take some ms

_ENTERED, _LET_IN, _LEFT = zmq.EVENT_ACCEPTED, zmq.EVENT_HANDSHAKE_SUCCEEDED, zmq.EVENT_DISCONNECTED
_STOPPED = zmq.EVENT_MONITOR_STOPPED


class ConnectionMonitor:
    """Reads the ZeroMQ connection events of one socket, in a thread of its own."""

    # ZeroMQ blocks on a slow listener: with hundreds of unauthenticated clients a scheduler in a long forward
    # would hold up its peers' connections.

    def __init__(self, socket: zmq.Socket, telemetry: Telemetry) -> None:
        """Before `socket` is bound."""
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_LIMIT_MS)
        self._socket, self._telemetry = socket, telemetry
        self._monitor = open_monitor(socket, _ENTERED | _LET_IN | _LEFT | _STOPPED)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="connection_monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the socket is closed."""
        self._socket.monitor(None, 0)  # which the thread is told, and ends
        self._thread.join(timeout=10)

    def check(self) -> None:
        """Raise the error that ended the thread."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._count()
        except BaseException as error:
            self._failure = error
        finally:
            self._monitor.close()

    def _count(self) -> None:
        """Refused: disconnections, up to accepted minus authenticated ones."""
        # Events carry no identity.
        counted: Counter[int] = Counter()
        while (event := recv_monitor_message(self._monitor)["event"]) != _STOPPED:
            counted[event] += 1
            refused = min(counted[_LEFT], counted[_ENTERED] - counted[_LET_IN])
            self._telemetry.refused_connections = max(self._telemetry.refused_connections, refused)
