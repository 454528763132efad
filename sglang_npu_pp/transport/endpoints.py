"""Endpoint records: node, ipc directory, TCP ports and key, exchanged over the engine's process group."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist
import zmq

from ..errors import TransportError

IPC_PATH_LIMIT = zmq.IPC_PATH_MAX_LEN  # bytes
RECORD_BYTES = 2048  # more than a record with 16 addresses needs; a fixed size makes one round enough
_LENGTH_BYTES = 2
DIRECTORY_PREFIX = "npp-"  # short: what it adds to a long TMPDIR must stay within the limit
_SOCKET = "lane"
_TOO_LONG = f"is longer than {IPC_PATH_LIMIT} bytes"

logger = logging.getLogger("sglang_npu_pp")


class EndpointRecord(msgspec.Struct, frozen=True, array_like=True):
    """A rank's record for its pipeline's other stages."""

    stage: int
    node: str  # equal for two ranks exactly when a unix socket of one is visible to the other
    ipc: str = ""  # endpoint for ranks of the same node
    tcp: tuple[str, ...] = ()  # endpoints for ranks of other nodes, in the order in which they are tried
    key: bytes = b""  # CURVE public key, Z85
    failure: str = ""  # why it cannot listen, in the sentence with which it fails itself


Exchange = Callable[[bytes], list[bytes]]
"""Gives every stage's bytes in stage order; over the process group that SGLang has already made."""


def process_group_exchange(group: dist.ProcessGroup) -> Exchange:
    """An `Exchange` over a group of host tensors (gloo) in stage order: fixed-size uint8, no pickle."""
    # The engine's group is not authenticated, so nothing that came over it is executed.

    def exchange(data: bytes) -> list[bytes]:
        if len(data) > RECORD_BYTES - _LENGTH_BYTES:
            raise TransportError(
                f"This rank's address record has {len(data)} bytes, more than {RECORD_BYTES}; "
                "set SGLANG_NPU_PP_IPC_DIR or SGLANG_NPU_PP_HOST to something shorter."
            )
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        mine = torch.frombuffer(bytearray(framed.ljust(RECORD_BYTES, b"\0")), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        return [_unframe(tensor.numpy().tobytes()) for tensor in everyone]

    return exchange


def _unframe(framed: bytes) -> bytes:
    length = int.from_bytes(framed[:_LENGTH_BYTES], "little")
    return framed[_LENGTH_BYTES : _LENGTH_BYTES + length]


def exchange_records(exchange: Exchange, mine: EndpointRecord) -> list[EndpointRecord]:
    decoder = msgspec.msgpack.Decoder(EndpointRecord)
    return [decoder.decode(record) for record in exchange(msgspec.msgpack.encode(mine))]


@dataclass(frozen=True)
class KeyPair:
    """CURVE keys of one process: new at every start, never written."""

    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> KeyPair:
        public, secret = zmq.curve_keypair()
        return cls(public, secret)


class KnownKeys:
    """ZAP callback: admits only these public keys, from a trusted path."""

    def __init__(self, *keys: bytes) -> None:
        self.keys: set[bytes] = set(keys)

    def callback(self, domain: str, key: bytes) -> bool:
        return key in self.keys


def node_identity() -> str:
    """The machine as unix sockets see it."""
    # Two containers of one host may share the kernel but neither files nor network, and two network
    # namespaces stand for two nodes in tests: both count as different nodes.
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [boot.read_text().strip() if boot.exists() else os.uname().nodename, str(os.getuid())]
    for namespace in ("mnt", "net"):
        link = Path("/proc/self/ns") / namespace
        parts.append(os.readlink(link) if link.exists() else "")
    return "|".join(parts)


class SocketDirectory:
    """A directory for one rank's ipc socket, accessible to this user only.

    `HostLane.seal` removes it once every peer is connected: a killed process leaves no files.
    """

    def __init__(self, base: Path | None, where: str) -> None:
        """In `base`; None: in the first usable one of `places()`.

        Raises TransportError, with each place's problem, if none can hold a socket.
        """
        problems = {}
        for place in [base] if base is not None else places():
            try:
                self.path = _made_in(place)
            except OSError as error:
                problems[place] = error.strerror or str(error)
            else:
                self.endpoint = f"ipc://{self.path / _SOCKET}"
                return
        reasons = "; ".join(f"{place} ({reason})" for place, reason in problems.items())
        if base is not None and _TOO_LONG in reasons:
            raise TransportError(
                f"{where}: the socket path {problems[base]}; set SGLANG_NPU_PP_IPC_DIR to a shorter "
                "directory, or leave it out."
            )
        raise TransportError(
            f"{where}: cannot make a directory for ipc sockets in {reasons}; "
            "set SGLANG_NPU_PP_IPC_DIR to one that this user can write."
        )

    def clear(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def places() -> list[Path]:
    """Candidates for socket directories: the temporary directory first, as for SGLang's own."""
    # The others are for a TMPDIR that is too long for a socket, or on a file system that has none.
    found = []
    with suppress(OSError):  # there is none
        found.append(Path(tempfile.gettempdir()))
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    found += [Path(runtime)] if runtime else []
    return list(dict.fromkeys([*found, *map(Path, ("/tmp", "/var/tmp", "/dev/shm"))]))


def _made_in(place: Path) -> Path:
    """A new private directory in `place`. Raises OSError if it cannot hold the socket."""
    path = Path(tempfile.mkdtemp(prefix=DIRECTORY_PREFIX, dir=place))
    name = os.fsencode(path / _SOCKET)
    try:
        if len(name) > IPC_PATH_LIMIT:
            raise OSError(errno.ENAMETOOLONG, f"{name.decode(errors='replace')} {_TOO_LONG}")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.bind(name)
        os.unlink(name)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def bind_tcp(socket: zmq.Socket, hosts: Sequence[str], port: int, where: str) -> tuple[str, ...]:
    """Bind to `port` (0: any free one) of each address; returns the endpoints for peers.

    An address that fails is left out. Raises TransportError, with every reason, if all fail.
    """
    endpoints = []
    errors: dict[str, zmq.ZMQError] = {}
    for host in hosts:
        try:
            endpoints.append(_bind_one(socket, host, port))
        except zmq.ZMQError as error:
            errors[host] = error
    tried = ", ".join(
        f"{_bracketed(host)}:{port or 'any port'} ({zmq.strerror(error.errno or 0)})"
        for host, error in errors.items()
    )
    if not endpoints:
        raise TransportError(f"{where}: the host lane cannot listen on {tried}; {_advice(errors.values())}.")
    if errors:
        logger.warning("%s: the host lane does not listen on %s", where, tried)
    return tuple(endpoints)


def _bind_one(socket: zmq.Socket, host: str, port: int) -> str:
    socket.setsockopt(zmq.IPV6, ":" in host)
    socket.bind(f"tcp://{_bracketed(host)}:{port or '*'}")
    return f"tcp://{_bracketed(host)}:{socket.getsockopt_string(zmq.LAST_ENDPOINT).rsplit(':', 1)[1]}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _advice(errors: Iterable[zmq.ZMQError]) -> str:
    if any(error.errno == errno.EADDRINUSE for error in errors):
        return (
            "set SGLANG_NPU_PP_PORT to a range that is free on this node, one port for each rank of each "
            "replica, or to 0"
        )
    return "set SGLANG_NPU_PP_HOST to an address or interface of this node that the others can reach"


def bind_ipc(socket: zmq.Socket, directory: SocketDirectory, where: str) -> str:
    try:
        socket.bind(directory.endpoint)
    except zmq.ZMQError as error:
        directory.clear()
        raise TransportError(
            f"{where}: cannot listen on {directory.endpoint} ({zmq.strerror(error.errno or 0)}); "
            "set SGLANG_NPU_PP_IPC_DIR to a directory on a local file system."
        ) from None
    return directory.endpoint
