"""The host lane: eager messages between the stages of one pipeline, over ZeroMQ.

Every rank binds one ROUTER socket for its node (ipc) and, if needed, one for others (TCP with CURVE), and
connects one DEALER to every other stage. Messages are pushed without a request and wait at the receiver. Rank
r talks only to rank r of other stages, never to tensor-parallel ranks.
"""

from __future__ import annotations

import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress

import zmq
from zmq.auth.thread import ThreadAuthenticator

from ..errors import PeerLostError, TransportError, WaitLimitError
from .addresses import LOOPBACK, listening_addresses
from .connection_monitor import ConnectionMonitor
from .context import RankContext
from .dialing import reach
from .endpoints import (
    EndpointRecord,
    Exchange,
    KeyPair,
    KnownKeys,
    SocketDirectory,
    bind_ipc,
    bind_tcp,
    exchange_records,
    node_identity,
)
from .inbox import Inbox, ReceiveChannel
from .liveness import Pulse
from .message import Kind, Message
from .outbox import Outbox, Peer
from .parts import refuse_longer_frames
from .window import Bounds

MAIN_PORT = "main"
DESCRIPTORS = 32  # of sockets that listen, their monitors, the authenticator, ZeroMQ's own
DESCRIPTORS_A_PEER = 12  # connections both ways, on two ports, and their monitors
FAILURE_CHARACTERS = 400  # of a sentence that the other stages are told; a record has little room
TERMINATION_LIMIT_S = 5.0  # for messages that linger, 1 s each at most

logger = logging.getLogger("sglang_npu_pp")


class HostLane:
    """The host lane of one rank. Owned by one thread, except for `open_port`."""

    def __init__(
        self,
        context: RankContext,
        *,
        host: str = LOOPBACK,
        master: str | None = None,
        port: int = 0,
        slots: int = 1,
    ) -> None:
        """`host`, `master`, `port` (0: any free one): the TCP endpoint, see `addresses.listening_addresses`.

        `slots`: microbatches of the loops on this lane; equal on all stages.
        """
        self.context = context
        self.stage, self.stages = context.stage, context.stages
        self._settings, self._where = context.settings, context.where
        self._host, self._master, self._port = host, master, port
        self.bounds = Bounds.for_loops(self._settings.window, self._settings.window_bytes, slots)
        self._zmq = zmq.Context()
        self._keys = KeyPair.generate()
        self._known = KnownKeys()
        self._pulse = Pulse()
        self._authenticator: ThreadAuthenticator | None = None
        self._directory: SocketDirectory | None = None
        self._sockets: list[zmq.Socket] = []
        self._connection_monitors: dict[zmq.Socket, ConnectionMonitor] = {}  # of the socket for other nodes
        self._records: list[EndpointRecord] = []
        self._endpoints: dict[int, str] = {}  # at which the peers answered
        self._outboxes: dict[int, Outbox] = {}
        self._inbox: Inbox  # from `open` on
        self._watched: list[Callable[[], None]] = []
        self._watched_outboxes: list[Outbox] = []
        self._closed = False

    # --- start ---------------------------------------------------------------------------------

    def open(self, exchange: Exchange) -> None:
        """Bind, exchange endpoint records, and connect to all stages; every stage calls it.

        Raises TransportError, naming the missing stages.
        """
        try:
            self._bind(exchange)
            self._inbox = Inbox(
                self._sockets,
                self.context,
                in_parts=self._connection_monitors,
                bounds=self.bounds,
                authenticate=self._authenticate,
            )
            self._endpoints = self._find_endpoints()
            self._outboxes = self.open_port(MAIN_PORT, senders=range(self.stages))
        except BaseException:
            self.close()
            raise

    def _check_descriptors(self) -> None:
        # ZeroMQ aborts the process where some of its calls find no descriptor left.
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(FileNotFoundError):  # where there is no /proc
            left = limit - len(os.listdir("/proc/self/fd"))
            needed = DESCRIPTORS + DESCRIPTORS_A_PEER * (self.stages - 1)
            if left < needed:
                raise TransportError(
                    f"{self._where}: this process may open {left} more files, but the host lane needs "
                    f"{needed}; raise the limit (ulimit -n)."
                )

    def open_port(self, port: str, senders: Collection[int]) -> dict[int, Outbox]:
        """Connections to all peers from each stage of `senders`, for a thread of their own.

        Every stage calls it at the same point; other stages get none. They may then move to another thread.
        """
        outboxes: dict[int, Outbox] = {}
        expected = {f"{stage}/{port}".encode() for stage in senders if stage != self.stage}
        try:
            if self.stage in senders:
                for record in self._records:
                    if record.stage != self.stage:
                        outboxes[record.stage] = self._connect(record, port)
            self._handshake(outboxes.values(), expected)
        except BaseException:
            for outbox in outboxes.values():
                outbox.close()
            raise
        return outboxes

    def seal(self) -> None:
        """Remove the ipc socket's files once all ports are open; a killed process then leaves none."""
        # Peers are connected when `open` and `open_port` return.
        if self._directory is not None:
            self._directory.clear()

    def _bind(self, exchange: Exchange) -> None:
        """Listen, and send the other stages, which wait for it, the endpoints or the failure."""
        identity = node_identity()
        apart = self._settings.host_transport == "tcp"  # as if every stage were on another node
        node = f"{identity}|{self.stage}" if apart else identity
        records = exchange_records(
            exchange, EndpointRecord(stage=self.stage, node=node, key=self._keys.public)
        )
        self._known.keys.update(record.key for record in records)  # before anyone learns where to connect to
        one_node = all(record.node in (identity, f"{identity}|{record.stage}") for record in records)
        failure: TransportError | None = None
        ipc: str = ""
        tcp: tuple[str, ...] = ()
        try:
            self._check_descriptors()
            ipc, tcp = self._listen(node, [record.node for record in records], one_node)
        except TransportError as error:
            failure = error
        said = str(failure)[:FAILURE_CHARACTERS] if failure else ""
        self._records = exchange_records(
            exchange, EndpointRecord(self.stage, node, ipc, tcp, self._keys.public, said)
        )
        if failure is not None:
            raise failure
        if failures := [record.failure for record in self._records if record.failure]:
            raise TransportError(f"{self._where}: another stage cannot listen. {' '.join(failures)}")

    def _listen(self, node: str, nodes: list[str], one_node: bool) -> tuple[str, tuple[str, ...]]:
        """The endpoints for ranks of this node and of others, if any."""
        ipc: str = ""
        tcp: tuple[str, ...] = ()
        if self._settings.host_transport == "ipc" and len(set(nodes)) > 1:
            raise TransportError(
                f"{self._where}: SGLANG_NPU_PP_HOST_TRANSPORT=ipc, but the stages are on several "
                "nodes; set it to auto."
            )
        if nodes.count(node) > 1:
            self._directory = SocketDirectory(self._settings.ipc_dir, self._where)
            ipc = bind_ipc(self._new_router(), self._directory, self._where)
        if len(set(nodes)) > 1:
            hosts = listening_addresses(self._host, master=self._master, one_node=one_node, where=self._where)
            router = self._new_router()
            self._authenticator = ThreadAuthenticator(self._zmq)
            self._authenticator.start()
            self._authenticator.configure_curve_callback("*", self._known)
            router.setsockopt(zmq.CURVE_SERVER, 1)
            router.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret)
            refuse_longer_frames(router)
            self._connection_monitors[router] = ConnectionMonitor(router, self.context.telemetry)
            self.watch(self._connection_monitors[router].check)
            tcp = bind_tcp(router, hosts, self._port, self._where)
        return ipc, tcp

    def _new_router(self) -> zmq.Socket:
        router = self._zmq.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.setsockopt(zmq.RCVHWM, 0)  # the windows of the senders bound what is queued
        self._sockets.append(router)
        return router

    def _find_endpoints(self) -> dict[int, str]:
        """Stage -> endpoint of every peer: the first address that answers."""
        found, several = {}, []
        for record in self._records:
            if record.stage == self.stage:
                continue
            if self.is_local(record.stage):
                found[record.stage] = record.ipc
            elif len(record.tcp) > 1:
                several.append(record)
            else:
                found[record.stage] = "".join(record.tcp)
        answered = reach(
            self._zmq, several, self._keys, where=self._where, limit_s=self._settings.start_limit_s
        )
        for record in several:
            if (endpoint := answered[record.stage]) != record.tcp[0]:
                logger.info(
                    "sglang-npu-pp: %s: stage %d answers at %s, and not at %s, which it named first",
                    self._where,
                    record.stage,
                    endpoint,
                    ", ".join(record.tcp[: record.tcp.index(endpoint)]),
                )
        return found | answered

    def _connect(self, record: EndpointRecord, port: str) -> Outbox:
        keys = None if self.is_local(record.stage) else self._keys
        peer = Peer(record.stage, port, self._endpoints[record.stage], record.key, keys)
        return Outbox(self.context, peer, sockets=self._zmq, bounds=self.bounds, pulse=self._pulse)

    def _handshake(self, outboxes: Iterable[Outbox], expected: set[bytes]) -> None:
        """Send hello over `outboxes`; wait for all welcomes and the `expected` connections."""
        outboxes = list(outboxes)
        for outbox in outboxes:
            outbox.send_control(Kind.HELLO)
        deadline = time.monotonic() + self._settings.start_limit_s
        while True:
            missing = [outbox for outbox in outboxes if not outbox.welcomed]
            absent = expected - self._inbox.admitted
            if not missing and not absent:
                return
            if time.monotonic() >= deadline:
                raise self._not_connected(missing, absent)
            self._inbox.pump(20)
            for outbox in missing:
                outbox.read_welcome()
                outbox.check()
            self.check()

    def _not_connected(self, missing: list[Outbox], absent: set[bytes]) -> TransportError:
        names = [f"stage {outbox.peer} at {outbox.endpoint} did not answer" for outbox in missing]
        told = ", ".join(self._records[self.stage].tcp)
        at = f" at {told}" if told else ""
        names += [f"stage {name.split(b'/')[0].decode()} did not connect to us{at}" for name in absent]
        return TransportError(
            f"{self._where}: after {self._settings.start_limit_s:g} s {' and '.join(names)}; "
            "look at that stage's log, and see that the stages reach each other's ports "
            "(SGLANG_NPU_PP_HOST, SGLANG_NPU_PP_PORT)."
        )

    def _authenticate(self, identity: bytes, frame: zmq.Frame) -> int | None:
        """A new connection's stage; None for an unauthenticated client."""
        # ipc: only this user reaches the socket. TCP: ZAP has admitted the key; it must be the claimed
        # stage's.
        stage_text, _, _ = identity.partition(b"/")
        if not stage_text.isdigit() or int(stage_text) >= self.stages:
            return None
        record = self._records[int(stage_text)]
        try:
            key = frame.get("User-Id")
        except zmq.ZMQError:
            key = ""
        if key == record.key.decode():
            return record.stage
        return record.stage if self.is_local(record.stage) and not key else None

    # --- use -----------------------------------------------------------------------------------

    @property
    def keys(self) -> KeyPair:
        """This rank's CURVE keys, which other sockets between the stages may use as well."""
        return self._keys

    @property
    def known_keys(self) -> Collection[bytes]:
        """Public keys of all stages, this one included."""
        return self._known.keys

    def key_of(self, stage: int) -> bytes:
        return self._records[stage].key

    def is_local(self, stage: int) -> bool:
        """Whether `stage` is on this node."""
        # There, copying bytes is cheaper than a collective.
        return self._records[stage].node == self._records[self.stage].node

    def endpoint_of(self, stage: int) -> str:
        return self._endpoints[stage]

    def send(self, peer: int, message: Message) -> None:
        """See Outbox.send."""
        outbox = self._outboxes[peer]
        try:
            outbox.send(message)
        except PeerLostError:
            with suppress(TransportError):
                self._inbox.pump(0)  # its goodbye came while this stage computed
            outbox.departed = peer in self._inbox.departed
            raise outbox.lost() from None

    def has_room(self, peer: int, kind: Kind) -> bool:
        """See Outbox.has_room."""
        return self._outboxes[peer].has_room(kind)

    def channel(self, source: int, kind: Kind) -> ReceiveChannel:
        """One stage's messages of one kind; always the same object."""
        return self._inbox.channel(source, kind)

    def receive(self, source: int, kind: Kind, limit_s: float | None = None) -> Message:
        """Wait for the next message, at most `limit_s` seconds (None: the setting).

        Raises PeerLostError, WaitLimitError, SequenceError.
        """
        channel = self._inbox.channel(source, kind)
        number = channel.post()
        for _ in self.wait_steps(channel, number, limit_s):
            pass
        return channel.take(number)

    def wait_steps(
        self, channel: ReceiveChannel, number: int, limit_s: float | None = None
    ) -> Iterator[None]:
        """Process arrivals until the message is here; yields every 0.1 s at most, where the caller may raise.

        Raises PeerLostError if a stage is gone, WaitLimitError after the limit.
        """
        channel.counters.waits += 1
        if number in channel.waiting:
            return
        began = time.monotonic()
        self._inbox.receive_next()
        while number not in channel.waiting:
            self.check()
            yield
            limit_s = self._settings.wait_limit_s if limit_s is None else limit_s
            if time.monotonic() - began >= limit_s:
                raise WaitLimitError(
                    f"{self._where}: {channel.kind.label} message {number} of stage {channel.source} did "
                    f"not come within {limit_s:g} s although that stage is alive; look at its log."
                )
            self._inbox.receive_next()
        channel.counters.wait_s += time.monotonic() - began

    def poll(self, timeout_ms: int = 0) -> None:
        """Process arrivals; waits up to `timeout_ms` for the first."""
        self._inbox.pump(timeout_ms)

    def on_announcement(self, function: Callable[[Message], None]) -> None:
        """Call `function` with every arriving message that has device-lane tensors."""
        self._inbox.on_announcement = function

    def watch(self, check: Callable[[], None], outboxes: Iterable[Outbox] = ()) -> None:
        """Run `check`, which raises failures from elsewhere, with the lane's own checks.

        `outboxes`: another thread's connections, in which the lane marks departed stages.
        """
        self._watched.append(check)
        self._watched_outboxes += outboxes

    def check(self) -> None:
        """Raise PeerLostError if any stage is gone (all are needed), or a thread's error."""
        for outbox in (*self._outboxes.values(), *self._watched_outboxes):
            outbox.departed = outbox.peer in self._inbox.departed
        for outbox in self._outboxes.values():
            outbox.check()
        for check in self._watched:
            check()

    def close(self) -> None:
        """Say goodbye and release sockets, threads and files. Can be called twice."""
        if self._closed:
            return
        self._closed = True
        for outbox in self._outboxes.values():
            outbox.send_control(Kind.GOODBYE)
            outbox.close()
        self._pulse.close()
        for connection_monitor in self._connection_monitors.values():
            connection_monitor.close()
        for socket in self._sockets:
            socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._terminate()
        if self._directory is not None:
            self._directory.clear()

    def _terminate(self) -> None:
        # ZeroMQ waits until all sockets are closed, and one may belong to a thread that cannot be ended.
        ending = threading.Thread(target=self._zmq.term, name="host-lane-end", daemon=True)
        ending.start()
        ending.join(TERMINATION_LIMIT_S)
        if ending.is_alive():
            logger.warning(
                "%s: connections are still open %g s after the lane's end, and go with the process.",
                self._where,
                TERMINATION_LIMIT_S,
            )
