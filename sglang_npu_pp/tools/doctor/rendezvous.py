"""Rendezvous of two nodes before they open a host lane.

A server exchanges addresses and keys over SGLang's process group; here one encrypted connection (CURVE) does,
with a shared secret that the operator copies from the listener. An unauthenticated client gets no answer. The
host lane has keys of its own.
"""

from __future__ import annotations

import re
import socket
import time
from types import TracebackType

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from ...errors import TransportError
from ...transport.addresses import listening_addresses
from ...transport.endpoints import KeyPair, KnownKeys

ANSWER_LIMIT_S = 30.0
"""Longest wait for anything once the two sides have met."""

KEY_CHARACTERS = 64  # 32 bytes, in a form that needs no quotes in a shell
_MESSAGE_LIMIT = 64 << 10  # bytes; far more than is exchanged here
_REACH_S = 5.0  # to open a TCP connection


def new_key() -> str:
    """A secret for one test."""
    return z85.decode(KeyPair.generate().secret).hex()


def key_pair(key: str) -> KeyPair:
    """The key pair of both sides. Raises ValueError for text that is no secret of `new_key`."""
    if not re.fullmatch(f"[0-9a-f]{{{KEY_CHARACTERS}}}", key):
        raise ValueError(f"the key must be the {KEY_CHARACTERS} characters that `doctor --listen` printed.")
    secret = z85.encode(bytes.fromhex(key))
    return KeyPair(zmq.curve_public(secret), secret)


class Rendezvous:
    """The connection; a context manager. `exchange` is for `HostLane.open`, stages 0 and 1."""

    def __init__(self, host: str, port: int, key: str, *, listens: bool, limit_s: float) -> None:
        """`host`, `port`: where this side listens ("*": everywhere; address, interface or name of this node),
        or the listener to dial (its address: `dialled`). `limit_s`: wait for the other side, in seconds; it
        then answers within ANSWER_LIMIT_S. Raises TransportError for a port that is taken or unreachable."""
        self._name, self._listens, self._limit_s = f"{host}:{port}", listens, limit_s
        self._met = False
        keys = key_pair(key)
        self.dialled = "" if listens else _reach(host, port)
        self._context = zmq.Context()
        self._authenticator: ThreadAuthenticator | None = None
        self._socket = self._context.socket(zmq.REP if listens else zmq.REQ)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MESSAGE_LIMIT)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        if listens:
            self._listen(host, port, keys)
        else:
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, keys.public)
            self._socket.connect(_endpoint(self.dialled, port))

    def _listen(self, host: str, port: int, keys: KeyPair) -> None:
        self._authenticator = ThreadAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", KnownKeys(keys.public))
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        try:
            for address in _to_listen_on(host):
                self._socket.bind(_endpoint(address, port))
        except (zmq.ZMQError, TransportError) as error:
            self.close()
            reason = zmq.strerror(error.errno or 0) if isinstance(error, zmq.ZMQError) else str(error)
            raise TransportError(
                f"the doctor cannot listen on {self._name} ({reason}); give --listen a free port and an "
                "address of this node."
            ) from None

    def exchange(self, data: bytes) -> list[bytes]:
        """Both sides' bytes, the listener's first. Raises TransportError without an answer in time."""
        if self._listens:
            theirs = self._receive()
            self._socket.send(data)
            return [data, theirs]
        self._socket.send(data)
        return [self._receive(), data]

    def _receive(self) -> bytes:
        if self._socket.poll(int(self._limit_s * 1000)):
            self._met, self._limit_s = True, ANSWER_LIMIT_S
            return self._socket.recv()
        if self._met:
            raise TransportError(
                f"the other node stopped answering for {self._limit_s:g} s; look at what its doctor says."
            )
        if self._listens:
            raise TransportError(
                f"no node with the key came to {self._name} within {self._limit_s:g} s; run the printed "
                "command there, and see that this port is open."
            )
        raise TransportError(
            f"{self._name} accepts connections but gave no answer within {self._limit_s:g} s; see that "
            "`doctor --listen` runs there and that the key is the one that it printed."
        )

    def close(self) -> None:
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()

    def __enter__(self) -> Rendezvous:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _to_listen_on(host: str) -> list[str]:
    if host == "*":
        return [host]
    return listening_addresses(host, master=None, one_node=False, where="doctor")


def _endpoint(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _reach(host: str, port: int) -> str:
    """The address that answers. Distinguishes an unreachable port from a wrong key; ZeroMQ would retry
    silently."""
    deadline = time.monotonic() + _REACH_S
    while True:
        try:
            with socket.create_connection((host, port), timeout=_REACH_S) as connection:
                return str(connection.getpeername()[0])
        except OSError as error:
            if not isinstance(error, ConnectionRefusedError) or time.monotonic() >= deadline:
                raise TransportError(
                    f"{host}:{port} cannot be reached ({error.strerror or error}); run `doctor --listen "
                    f"{port}` there first, and see that the port is open."
                ) from None
            time.sleep(0.1)  # the other side may be about to listen
