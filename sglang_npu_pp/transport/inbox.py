"""Everything that arrives at one rank: authenticated, numbered, and sorted by sender and kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import zmq

from ..errors import MessageError, SequenceError, WaitLimitError
from ..observe.telemetry import ChannelCounters, Telemetry
from ..observe.trace import Trace
from .message import Buffer, Header, Kind, Message, decode, read_header
from .outbox import CREDIT, POLL_MS, port_of
from .parts import Blocks, join
from .window import Bounds, CreditMeter


@dataclass(slots=True)
class _Channel:
    """Messages of one kind from one stage."""

    meter: CreditMeter
    counters: ChannelCounters
    arrived: int = 0  # the number that the next message must carry
    waiting: dict[int, Message] = field(default_factory=dict)
    reply_to: tuple[zmq.Socket, bytes] | None = None


class Inbox:
    """Receives from all peers. Owned by one thread.

    `authenticate(identity, frame)` decides whether the sender of a frame is the stage it claims to be. A
    connection opens with a hello; before that nothing but a header is read from it. Over the sockets
    `in_parts` long frames come in parts (`parts`).
    """

    def __init__(
        self,
        sockets: Iterable[zmq.Socket],
        *,
        in_parts: Collection[zmq.Socket],
        where: str,
        bounds: Bounds,
        wait_limit_s: float,
        check_all: bool,
        authenticate: Callable[[bytes, zmq.Frame], int | None],
        telemetry: Telemetry,
        trace: Trace,
    ) -> None:
        self.on_arrival: Callable[[Message], None] = lambda message: None
        self.greeted: set[bytes] = set()  # b"STAGE/PORT" of the connections that have opened
        self.departed: set[int] = set()
        self._sockets, self._in_parts = list(sockets), set(in_parts)
        self._blocks = Blocks()
        self._where, self._bounds, self._wait_limit_s = where, bounds, wait_limit_s
        self._check_all, self._authenticate = check_all, authenticate
        self._telemetry, self._trace = telemetry, trace
        self._stages: dict[bytes, int] = {}  # authenticated identities
        self._channels: dict[tuple[int, Kind], _Channel] = {}
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)

    def has(self, source: int, kind: Kind, number: int) -> bool:
        return number in self._channel(source, kind).waiting

    def oldest(self, source: int, kind: Kind) -> Message | None:
        """The first message of a channel that has arrived and was not taken."""
        return next(iter(self._channel(source, kind).waiting.values()), None)

    def take(self, source: int, kind: Kind, number: int) -> Message:
        """Remove a message that has arrived, and give its sender credit."""
        channel = self._channel(source, kind)
        message = channel.waiting.pop(number)
        if channel.meter.take(message.nbytes) and channel.reply_to is not None:
            socket, identity = channel.reply_to
            meter = channel.meter
            credit = CREDIT.pack(kind, meter.reported_messages, meter.reported_bytes)
            socket.send_multipart([identity, credit])
        return message

    def wait(
        self, source: int, kind: Kind, number: int, check: Callable[[], None], limit_s: float | None
    ) -> Message:
        """The message `number` of a channel, as soon as it is there.

        `check` is called while waiting and raises when the peer is gone. Raises WaitLimitError after
        `limit_s` seconds (None: the setting).
        """
        channel = self._channel(source, kind)
        counters = channel.counters
        counters.waits += 1
        if number not in channel.waiting:
            began = time.monotonic()
            limit = self._wait_limit_s if limit_s is None else limit_s
            while True:
                self.pump(POLL_MS)
                if number in channel.waiting:
                    break
                check()
                if time.monotonic() - began >= limit:
                    raise WaitLimitError(
                        f"{self._where}: {kind.label} message {number} of stage {source} did not "
                        f"come within {limit:g} s although that stage is alive; look at its log."
                    )
            counters.wait_s += time.monotonic() - began
        return self.take(source, kind, number)

    def pump(self, timeout_ms: int) -> None:
        """Sort in everything that has arrived; waits up to `timeout_ms` for a first message."""
        for socket, _ in self._poller.poll(timeout_ms):
            more = True
            while more:
                self._receive(socket)
                more = socket.get(zmq.EVENTS) & zmq.POLLIN  # cheaper than the exception of an empty socket

    def _receive(self, socket: zmq.Socket) -> None:
        identity = socket.recv(zmq.NOBLOCK)
        frames = [socket.recv(zmq.NOBLOCK, copy=False)]  # behind an identity there is at least one
        while frames[-1].more:
            frames.append(socket.recv(zmq.NOBLOCK, copy=False))
        stage = self._stages.get(identity)
        if stage is None:
            self._handshake(socket, identity, frames)
            return
        try:
            buffers: list[Buffer] = [frame.buffer for frame in frames]
            if socket in self._in_parts:
                del frames  # which would keep every part until the last one is copied
                buffers = join(buffers, self._blocks)
            header = read_header(buffers[0])
            if header.source != stage:
                raise MessageError(f"It claims to come from stage {header.source}.")
            if header.kind is Kind.GOODBYE:
                self.departed.add(stage)
                return
            self._sort_in(header, buffers, (socket, identity))
        except MessageError as error:
            self._telemetry.refused += 1
            raise MessageError(
                f"{self._where}: a message of stage {stage} cannot be used. {error} "
                "Restart the server; if it happens again, look at the network between the stages."
            ) from None

    def _sort_in(self, header: Header, buffers: list[Buffer], sender: tuple[zmq.Socket, bytes]) -> None:
        channel = self._channel(header.source, header.kind)
        self._check_number(channel, header)
        message = decode(header, buffers, check_all=self._check_all)
        channel.arrived += 1
        channel.reply_to = sender
        channel.waiting[message.number] = message
        channel.counters.messages += 1
        channel.counters.bytes += message.nbytes + message.device_nbytes
        self._trace.record("arrive", message.kind.label, message.slot, message.iteration)
        self.on_arrival(message)

    def _handshake(self, socket: zmq.Socket, identity: bytes, frames: list[zmq.Frame]) -> None:
        """The first message of a connection: the hello of a stage, else it is dropped."""
        stage = self._authenticate(identity, frames[-1])
        if stage is None or not _is_hello(frames, stage):
            self._telemetry.refused += 1
            return
        self._stages[identity] = stage
        self.greeted.add(port_of(identity))
        socket.send_multipart([identity, CREDIT.pack(Kind.HELLO, 0, 0)])

    def _check_number(self, channel: _Channel, header: Header) -> None:
        if header.number != channel.arrived:
            raise SequenceError(
                f"{self._where}: expected {header.kind.label} message {channel.arrived} of stage "
                f"{header.source} but number {header.number} came: messages were lost or repeated; "
                "restart the server."
            )
        if len(channel.waiting) >= self._bounds.messages:
            raise SequenceError(
                f"{self._where}: stage {header.source} has more than {self._bounds.messages} "
                f"{header.kind.label} messages "
                "in flight, past the window it agreed to; install the same sglang-npu-pp everywhere."
            )

    def _channel(self, source: int, kind: Kind) -> _Channel:
        channel = self._channels.get((source, kind))
        if channel is None:
            channel = _Channel(CreditMeter(self._bounds), self._telemetry.receiving(kind.label))
            self._channels[source, kind] = channel
        return channel


def _is_hello(frames: list[zmq.Frame], stage: int) -> bool:
    if len(frames) != 1:
        return False
    try:
        header = read_header(frames[0].buffer)
    except MessageError:
        return False
    return header.kind == Kind.HELLO and header.source == stage
