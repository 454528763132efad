"""One connection to one peer: numbered messages out, credit back.

Adds numbering, the window and detection of a lost peer to ZeroMQ's connection and encryption.
"""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from ..errors import PeerLostError, TransportError, WaitLimitError
from ..observe.telemetry import ChannelCounters
from .context import RankContext
from .endpoints import KeyPair
from .liveness import OtherEnd, Pulse, keep_talking
from .message import Buffer, Kind, Message, encode
from .monitor import open_monitor
from .parts import PART_BYTES, cut, refuse_longer_frames
from .window import Bounds, Window

CREDIT = struct.Struct("<BQQ")  # kind, messages taken, bytes taken
ZERO_COPY_BYTES = 64 << 10  # below, copying is cheaper than handing the memory over
POLL_MS = 100  # how often a wait looks whether the peer is still there
LINGER_MS = 1000
_NOBLOCK = int(zmq.NOBLOCK)
SETTLE_S = 0.5  # a server that is being stopped kills its ranks one after another: not an error yet

# Why a peer does not let us in and never will, by the event that says so.
_REFUSALS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "authentication failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "it does not speak the protocol of the host lane",
}
_ENDED = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_WATCHED = zmq.EVENT_CONNECTED | _ENDED
for _event in _REFUSALS:
    _WATCHED |= _event


def connection_identity(stage: int, port: str, attempt: int) -> bytes:
    return f"{stage}/{port}/{attempt}".encode()


def port_of(identity: bytes) -> bytes:
    """The connection's name, b"STAGE/PORT", without the attempt."""
    return b"/".join(identity.split(b"/")[:2])


@dataclass(slots=True)
class _Channel:
    """Messages of one kind to this peer; the next number is the count sent."""

    kind: Kind
    window: Window
    counters: ChannelCounters


@dataclass(frozen=True)
class Peer:
    """The stage at the other end of a connection, and its endpoint."""

    stage: int
    port: str  # name of the connection: each thread that sends has its own
    endpoint: str
    key: bytes = b""  # its CURVE public key
    keys: KeyPair | None = None  # our own; None on one node


class Outbox:
    """Sends to one peer. Owned by one thread.

    A broken connection is made again until the peer's welcome; later it ends the lane, as messages may be
    lost.
    """

    # A peer without the GIL for long, while it loads something, misses the time for a handshake.

    def __init__(
        self,
        context: RankContext,
        peer: Peer,
        *,
        sockets: zmq.Context,
        bounds: Bounds,
        pulse: Pulse,
    ) -> None:
        self.peer, self.endpoint = peer.stage, peer.endpoint
        self.departed = False  # the peer said goodbye
        self.welcomed = False  # the peer has accepted our hello
        self._context, self._peer, self._sockets, self._bounds = context, peer, sockets, bounds
        self._check_all, self._trace = context.check_all, context.trace
        self._peer_timeout_s = context.settings.peer_timeout_s
        self._channels: dict[Kind, _Channel] = {}
        self._lost_at: float | None = None
        self._connected = self._was_connected = False  # now, ever
        self._attempt = 0
        self._other_end: OtherEnd | None = None
        self._pulse = pulse
        self._refused: str | None = None
        self._last_sent: _Channel | None = None
        self._next_check = 0.0
        self._abandoned = False
        self._open_socket()

    def _open_socket(self) -> None:
        try:
            self._socket = self._sockets.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            raise self._cannot_connect(error) from None
        try:
            self._connect()
        except BaseException as error:
            self._socket.close(linger=0)  # a context that has an open socket cannot be terminated
            if isinstance(error, zmq.ZMQError):
                raise self._cannot_connect(error) from None
            raise

    def _connect(self) -> None:
        socket = self._socket
        # Without what zmq.Socket adds, in Python, for drafts of ZeroMQ.
        self._send = super(zmq.Socket, socket).send  # type: ignore[misc]
        # Of each attempt its own: the peer may not know yet that the one before has ended.
        identity = connection_identity(self._context.stage, self._peer.port, self._attempt)
        socket.setsockopt(zmq.ROUTING_ID, identity)
        socket.setsockopt(zmq.LINGER, LINGER_MS)
        socket.setsockopt(zmq.SNDHWM, 0)  # the window bounds what is queued, in bytes too
        socket.setsockopt(zmq.RECONNECT_IVL, -1)  # a broken connection has lost messages
        socket.setsockopt(zmq.IPV6, 1)
        keep_talking(socket, self._peer_timeout_s)
        if (keys := self._peer.keys) is not None:
            refuse_longer_frames(socket)
            socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
            socket.setsockopt(zmq.CURVE_SERVERKEY, self._peer.key)
        self.monitor = open_monitor(socket, _WATCHED)
        try:
            socket.connect(self.endpoint)
        except BaseException:
            self.monitor.close()
            raise

    def _cannot_connect(self, error: zmq.ZMQError) -> TransportError:
        return TransportError(
            f"{self._context.where}: cannot connect to stage {self.peer} at {self.endpoint} "
            f"({zmq.strerror(error.errno or 0)}); set SGLANG_NPU_PP_HOST of that stage to an address of its "
            "node, or see that this process may open more files (ulimit -n)."
        )

    def send(self, message: Message) -> None:
        """Push `message`; returns at once unless the window is full.

        Raises PeerLostError, or WaitLimitError if the peer takes nothing in time.
        """
        if self._abandoned or time.monotonic() >= self._next_check:
            self.check()
        channel = self._channels.get(message.kind) or self._open_channel(message.kind)
        window, counters = channel.window, channel.counters
        number = window.sent_messages
        frames = encode(message, source=self._context.stage, number=number, check_all=self._check_all)
        nbytes = message.nbytes
        if not window.has_room(nbytes):
            self._read_credit()
            if not window.has_room(nbytes):
                began = time.monotonic()
                if self._trace.enabled:
                    self._trace.record("full", message.kind.label, message.slot, message.iteration)
                self._wait_for_room(message, window)
                counters.backpressure += 1
                counters.backpressure_s += time.monotonic() - began
        self._push(frames, copy=message.borrowed)
        window.sent(nbytes)
        counters.messages += 1
        counters.bytes += nbytes + message.device_nbytes
        self._last_sent = channel
        if self._trace.enabled:
            self._trace.record("push", message.kind.label, message.slot, message.iteration)

    def has_room(self, kind: Kind) -> bool:
        """Whether a small message of `kind` would not wait."""
        self._read_credit()
        return (self._channels.get(kind) or self._open_channel(kind)).window.has_room(0)

    def _open_channel(self, kind: Kind) -> _Channel:
        channel = _Channel(kind, Window(self._bounds), self._context.telemetry.sending(kind.label))
        self._channels[kind] = channel
        return channel

    def send_control(self, kind: Kind) -> None:
        """Send a hello or goodbye outside the window; lost if the peer is gone."""
        frames = encode(Message(kind=kind), source=self._context.stage, number=0, check_all=True)
        with suppress(zmq.Again):
            self._socket.send_multipart(frames, zmq.NOBLOCK)

    def abandon(self) -> None:
        """From any thread: end a wait for room, within 0.1 s."""
        self._abandoned = True

    def check(self) -> None:
        """Raise if the peer is gone. Cheap: inspects the connection every 0.1 s at most."""
        if self._abandoned:
            raise TransportError(
                f"{self._context.where}: closed while messages to stage {self.peer} were waiting."
            )
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + POLL_MS / 1000
        self.read_monitor()
        if self._refused is not None:
            raise TransportError(
                f"{self._context.where}: stage {self.peer} at {self.endpoint} refused our connection "
                f"({self._refused}); make sure that all ranks were started together."
            )
        if not self.welcomed:
            self._repeat_the_attempt()
            return
        if self._lost_at is not None and now - self._lost_at >= SETTLE_S:
            raise self.lost()
        if self._silent_s() >= self._peer_timeout_s:
            raise self.lost()

    def _repeat_the_attempt(self) -> None:
        # If it has ended. A peer that lets the handshake time out still listens; without a listener the
        # process has ended.
        if self._lost_at is None:
            return
        if self._was_connected and not self._connected:
            raise self.lost()
        self.close()
        self._attempt += 1
        self._lost_at, self._connected = None, False
        self._open_socket()
        self.send_control(Kind.HELLO)

    def _silent_s(self) -> float:
        """Seconds of the peer's silence while this process ran."""
        if self._other_end is None:
            return 0.0
        return min(self._other_end.silent_s(), self._pulse.awake_s)

    def lost(self) -> PeerLostError:
        how = (
            "has shut down"
            if self.departed
            else f"is gone: its connection broke or was silent for {self._peer_timeout_s:g} s"
        )
        last = "nothing"
        if self._last_sent is not None:
            last = f"{self._last_sent.kind.label} message {self._last_sent.window.sent_messages - 1}"
        return PeerLostError(
            f"{self._context.where}: stage {self.peer} {how} (last sent to it: {last}); "
            "look at that stage's log for the first error, then restart the server."
        )

    def read_monitor(self) -> None:
        while self.monitor.poll(0):
            said = recv_monitor_message(self.monitor)
            event = said["event"]
            if event == zmq.EVENT_CONNECTED:
                self._other_end = OtherEnd(said["value"])
                self._connected = self._was_connected = True
            elif event & _ENDED:
                self._other_end = None
                self._lost_at = self._lost_at or time.monotonic()
            elif event in _REFUSALS:
                self._refused = _REFUSALS[event]

    def read_welcome(self) -> None:
        """Process the peer's replies; sets `welcomed`."""
        self._read_credit()

    def close(self) -> None:
        """Flush the queue unless the peer is gone. Can be called twice."""
        if self._socket.closed:
            return
        self.read_monitor()
        gone = self._lost_at is not None or self._refused is not None
        self._socket.monitor(None, 0)
        self.monitor.close()
        self._socket.close(linger=0 if gone else None)

    def _push(self, frames: list[Buffer], copy: bool) -> None:
        """Hand `frames` to ZeroMQ."""
        # Without a high-water mark that blocks only when the connection is gone, and then for ever; `check`
        # raises at the end of the settling time.
        if len(frames) > 1 or len(frames[0]) >= PART_BYTES:
            if self._peer.keys is not None:  # between nodes
                frames = cut(frames)
            copy = copy or max(map(len, frames)) < ZERO_COPY_BYTES
        while True:
            try:
                if len(frames) == 1:
                    self._send(frames[0], _NOBLOCK)
                else:
                    self._socket.send_multipart(frames, zmq.NOBLOCK, copy=copy)
                return
            except zmq.Again:
                self._socket.poll(POLL_MS, zmq.POLLOUT)
                self.check()

    def _wait_for_room(self, message: Message, window: Window) -> None:
        limit_s = self._context.settings.wait_limit_s
        deadline = time.monotonic() + limit_s
        while not window.has_room(message.nbytes):
            if time.monotonic() >= deadline:
                raise WaitLimitError(
                    f"{self._context.where}: stage {self.peer} took no {message.kind.label} message for "
                    f"{limit_s:g} s while {window.sent_messages - window.taken_messages} "
                    "were in flight; look at that stage's log."
                )
            if self._socket.poll(POLL_MS):
                self._read_credit()
            self.check()

    def _read_credit(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            kind, messages, nbytes = CREDIT.unpack(frame)
            if kind == Kind.HELLO:
                self.welcomed = True
            elif (channel := self._channels.get(Kind(kind))) is not None:
                channel.window.credit(messages, nbytes)
