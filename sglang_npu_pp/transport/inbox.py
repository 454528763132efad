"""All arrivals of one rank: authenticated, numbered, sorted by sender and kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import zmq

from ..errors import MessageError, SequenceError
from ..observe.telemetry import ChannelCounters
from .context import RankContext
from .message import Buffer, Header, Kind, Message, decode, read_header
from .outbox import CREDIT, POLL_MS, port_of
from .parts import Blocks, join
from .window import Bounds, CreditMeter

_POLLIN = int(zmq.POLLIN)  # arithmetic with the flag makes a flag, in Python
_NOBLOCK = int(zmq.NOBLOCK)
_GOODBYE = Kind.GOODBYE  # looked up in Python in some releases of it
_VIEW: Callable[[zmq.Frame], Buffer] = memoryview  # type: ignore[assignment]  # `Frame.buffer` keeps a reference


@dataclass(slots=True)
class ReceiveChannel:
    """Messages of one kind from one stage, numbered from 0 on both sides."""

    source: int
    kind: Kind
    meter: CreditMeter  # counts what the program has taken
    counters: ChannelCounters
    posted: int = 0  # the number that the program has to wait for next
    arrived: int = 0  # the number that the next message must carry
    waiting: dict[int, Message] = field(default_factory=dict)
    reply_to: tuple[zmq.Socket, bytes] | None = None

    def post(self) -> int:
        """The number of the next expected message."""
        number = self.posted
        self.posted = number + 1
        return number

    def oldest(self) -> Message | None:
        """The first untaken message."""
        return next(iter(self.waiting.values()), None)

    def take(self, number: int) -> Message:
        """Remove an arrived message and give its sender credit."""
        message = self.waiting.pop(number)
        meter = self.meter
        if meter.take(message.nbytes) and self.reply_to is not None:
            socket, identity = self.reply_to
            credit = CREDIT.pack(self.kind, meter.reported_messages, meter.reported_bytes)
            socket.send_multipart([identity, credit])
        return message


class Inbox:
    """Receives from all peers. Owned by one thread.

    `authenticate(identity, frame)`: the sender's stage, or None. Before a connection's hello only headers are
    read. `in_parts`: sockets with frames in parts (`parts`). `on_announcement` gets messages with device-lane
    tensors, in arrival order.
    """

    def __init__(
        self,
        sockets: Iterable[zmq.Socket],
        context: RankContext,
        *,
        in_parts: Collection[zmq.Socket],
        bounds: Bounds,
        authenticate: Callable[[bytes, zmq.Frame], int | None],
    ) -> None:
        self.on_announcement: Callable[[Message], None] | None = None
        self.admitted: set[bytes] = set()  # b"STAGE/PORT" of the connections that have opened
        self.departed: set[int] = set()
        self._sockets, self._in_parts = list(sockets), set(in_parts)
        self._blocks = Blocks()
        self._context, self._bounds, self._authenticate = context, bounds, authenticate
        self._check_all, self._trace = context.check_all, context.trace
        self._stages: dict[bytes, int] = {}  # authenticated identities
        self._channels: dict[tuple[int, Kind], ReceiveChannel] = {}
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
            socket.setsockopt(zmq.RCVTIMEO, POLL_MS)
        self._only = self._sockets[0] if len(self._sockets) == 1 else None

    def channel(self, source: int, kind: Kind) -> ReceiveChannel:
        channel = self._channels.get((source, kind))
        if channel is None:
            counters = self._context.telemetry.receiving(kind.label)
            channel = ReceiveChannel(source, kind, CreditMeter(self._bounds), counters)
            self._channels[source, kind] = channel
        return channel

    def pump(self, timeout_ms: int) -> None:
        """Process all arrivals; waits up to `timeout_ms` for the first."""
        if timeout_ms:
            self._poller.poll(timeout_ms)
        for socket in self._sockets:
            while int(socket.get(zmq.EVENTS)) & _POLLIN:  # cheaper than a poll, or an exception
                self._receive(socket, socket.recv(_NOBLOCK))

    def receive_next(self) -> None:
        """Process the next arrival, or all where their time counts; waits up to POLL_MS for the first."""
        # One socket waits by itself: a poll in front of it doubles the system calls.
        if self._only is None:
            self.pump(POLL_MS)
            return
        try:
            identity = self._only.recv()
        except zmq.Again:
            return
        self._receive(self._only, identity)
        if self.on_announcement is not None or self._trace.enabled:
            self.pump(0)  # announcements post receives, and traces say when a message arrived

    def _receive(self, socket: zmq.Socket, identity: bytes) -> None:
        frame = socket.recv(_NOBLOCK, copy=False)  # behind an identity there is at least one
        buffers = [_VIEW(frame)]
        while frame.more:
            frame = socket.recv(_NOBLOCK, copy=False)
            buffers.append(_VIEW(frame))
        stage = self._stages.get(identity)
        if stage is None:
            self._handshake(socket, identity, buffers, frame)
            return
        try:
            if self._in_parts and socket in self._in_parts:
                buffers = join(buffers, self._blocks)
            header = read_header(buffers[0])
            if header.source != stage:
                raise MessageError(f"It claims to come from stage {header.source}.")
            if header.kind is _GOODBYE:
                self.departed.add(stage)
                return
            self._sort_in(header, buffers, (socket, identity))
        except MessageError as error:
            self._context.telemetry.refused += 1
            raise MessageError(
                f"{self._context.where}: a message of stage {stage} cannot be used. {error} "
                "Restart the server; if it happens again, look at the network between the stages."
            ) from None

    def _sort_in(self, header: Header, buffers: list[Buffer], sender: tuple[zmq.Socket, bytes]) -> None:
        channel = self._channels.get((header.source, header.kind)) or self.channel(header.source, header.kind)
        if header.number != channel.arrived or len(channel.waiting) >= self._bounds.messages:
            raise self._out_of_order(channel, header)
        message = decode(header, buffers, check_all=self._check_all)
        channel.arrived += 1
        channel.reply_to = sender
        channel.waiting[header.number] = message
        counters = channel.counters
        counters.messages += 1
        counters.bytes += message.nbytes + message.device_nbytes
        if self._trace.enabled:
            self._trace.record("arrive", message.kind.label, message.slot, message.iteration)
        if message.device_nbytes and self.on_announcement is not None:
            self.on_announcement(message)

    def _handshake(
        self, socket: zmq.Socket, identity: bytes, buffers: list[Buffer], frame: zmq.Frame
    ) -> None:
        """A connection's first message, with its last frame: a stage's hello, otherwise dropped."""
        stage = self._authenticate(identity, frame)
        if stage is None or not _is_hello(buffers, stage):
            self._context.telemetry.refused += 1
            return
        self._stages[identity] = stage
        self.admitted.add(port_of(identity))
        socket.send_multipart([identity, CREDIT.pack(Kind.HELLO, 0, 0)])

    def _out_of_order(self, channel: ReceiveChannel, header: Header) -> SequenceError:
        if header.number != channel.arrived:
            return SequenceError(
                f"{self._context.where}: expected {header.kind.label} message {channel.arrived} of stage "
                f"{header.source} but number {header.number} came: messages were lost or repeated; "
                "restart the server."
            )
        return SequenceError(
            f"{self._context.where}: stage {header.source} has more than {self._bounds.messages} "
            f"{header.kind.label} messages "
            "in flight, past the window it agreed to; install the same sglang-npu-pp everywhere."
        )


def _is_hello(buffers: list[Buffer], stage: int) -> bool:
    if len(buffers) != 1:
        return False
    try:
        header = read_header(buffers[0])
    except MessageError:
        return False
    return header.kind == Kind.HELLO and header.source == stage
