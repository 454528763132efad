"""Finds the address at which a peer answers.

Attempts start in address order, staggered, and run together (RFC 8305, as in browsers); the first to prove
the peer's key wins. Other machines with that address (container bridges) and catch-all proxies lack the key.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import TransportError
from .endpoints import EndpointRecord, KeyPair
from .monitor import open_monitor

STAGGER_S = 0.5  # until the next attempt is started; twice as long when all have been tried
MOST_AT_ONCE = 3  # of one peer: descriptors are counted (host_lane.DESCRIPTORS_A_PEER)
ANSWER_S = 15.0  # for a peer that accepts the connection, and may be held up by an import
_RETRY_MS = 200
_POLL_MS = 50
_EVENTS = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def reach(
    context: zmq.Context, peers: Iterable[EndpointRecord], keys: KeyPair, *, where: str, limit_s: float
) -> dict[int, str]:
    """Stage -> the endpoint that proved its key, for all `peers`; blocks until complete.

    Raises TransportError, listing every attempt, after `limit_s` seconds.
    """
    dials = [_Dial(context, record, keys) for record in peers]
    found: dict[int, str] = {}
    deadline = time.monotonic() + limit_s
    try:
        while len(found) < len(dials):
            now = time.monotonic()
            if now >= deadline:
                missing = " and ".join(str(dial) for dial in dials if dial.stage not in found)
                raise TransportError(
                    f"{where}: after {limit_s:g} s {missing}; set SGLANG_NPU_PP_HOST there to an address or "
                    "interface that this node reaches, and see that its ports are open."
                )
            for dial in dials:
                if dial.stage not in found and (endpoint := dial.step(now)) is not None:
                    found[dial.stage] = endpoint
                    dial.close()
            _wait([dial for dial in dials if dial.stage not in found])
    finally:
        for dial in dials:
            dial.close()
    return found


class _Dial:
    """All attempts to reach one peer."""

    def __init__(self, context: zmq.Context, record: EndpointRecord, keys: KeyPair) -> None:
        self.stage = record.stage
        self.under_way: list[_Attempt] = []
        self._context, self._record, self._keys = context, record, keys
        self._next = deque(record.tcp)
        self._started = 0
        self._due = 0.0
        self._accepted: set[str] = set()  # where somebody listens, if not the peer

    def step(self, now: float) -> str | None:
        """Start due attempts; returns the endpoint that answered, the first of several."""
        if now >= self._due and self._next:
            self._start(now)
        for attempt in self.under_way:
            attempt.look()
            if attempt.accepted:
                self._accepted.add(attempt.endpoint)
            if attempt.succeeded:
                return attempt.endpoint
        return None

    def _start(self, now: float) -> None:
        if len(self.under_way) == MOST_AT_ONCE:
            worst = next((each for each in self.under_way if not each.connected), self.under_way[0])
            if worst.connected and now - worst.began < ANSWER_S:
                return
            self.under_way.remove(worst)
            worst.close()
            self._next.append(worst.endpoint)
        self.under_way.append(_Attempt(self._context, self._next.popleft(), self._keys, self._record.key))
        self._due = now + STAGGER_S * 2 ** (self._started // len(self._record.tcp))
        self._started += 1

    def close(self) -> None:
        while self.under_way:
            self.under_way.pop().close()

    def __str__(self) -> str:
        tried = (
            f"{endpoint} ({'it does not show its key' if endpoint in self._accepted else 'no connection'})"
            for endpoint in self._record.tcp
        )
        return f"stage {self.stage} did not answer at {', '.join(tried)}"


class _Attempt:
    """A trial connection; ZeroMQ repeats it by itself."""

    def __init__(self, context: zmq.Context, endpoint: str, keys: KeyPair, peer_key: bytes) -> None:
        self.endpoint = endpoint
        self.began = time.monotonic()
        self.connected = self.accepted = self.succeeded = False
        self._socket = context.socket(zmq.DEALER)
        try:
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.IPV6, 1)
            self._socket.setsockopt(zmq.RECONNECT_IVL, _RETRY_MS)
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, peer_key)
            self.monitor = open_monitor(self._socket, _EVENTS)
        except BaseException:
            self._socket.close()
            raise
        with suppress(zmq.ZMQError):  # an address of a kind that this machine does not have
            self._socket.connect(endpoint)

    def look(self) -> None:
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.succeeded = True
            else:
                self.connected = event == zmq.EVENT_CONNECTED
                self.accepted |= self.connected  # and may have been closed again since the last look

    def close(self) -> None:
        self._socket.monitor(None, 0)
        self.monitor.close()
        self._socket.close()


def _wait(dials: Iterable[_Dial]) -> None:
    """For an event of any attempt, `_POLL_MS` at most."""
    poller = zmq.Poller()
    for dial in dials:
        for attempt in dial.under_way:
            poller.register(attempt.monitor, zmq.POLLIN)
    if poller.sockets:
        poller.poll(_POLL_MS)
