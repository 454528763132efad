"""Unauthenticated clients of a port that speaks ZMTP with CURVE: they send nothing, or up to 64 MiB."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

GIBIBYTE, MEBIBYTE = 1 << 30, 1 << 20
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
LONG_COMMAND = b"\x06" + struct.pack(">Q", GIBIBYTE)  # ZMTP: a command with a length of 8 bytes
LONG_MESSAGE = b"\x02" + struct.pack(">Q", GIBIBYTE)
HTTP = b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n"
TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200))
SCANS = (b"", HTTP, TLS_HELLO, GREETING, GREETING.replace(b"CURVE", b"NULL\0"))
_HELLO = b"\x04\xc8\x05HELLO\x01" + bytes(193)  # of CURVE, with a box that nobody made

_LIMIT_S = 20.0  # less than the 30 s after which ZeroMQ itself gives a handshake up
_PAUSE_S = (0.0, 0.3)
_SLOW = 20  # connections that are left open until the end of a visit
_SENT_MIB = 64  # of the gibibyte that is announced, unless the connection is closed before


def connect(address: tuple[str, int], said: bytes = b"") -> socket.socket:
    """A connection on which `said` was said, or as much of it as was listened to."""
    connection = socket.create_connection(address, timeout=_LIMIT_S)
    with contextlib.suppress(ConnectionError):
        connection.sendall(said)
    return connection


def send_much(connection: socket.socket, mebibytes: int = _SENT_MIB) -> None:
    """So much, or until nobody listens any more."""
    with contextlib.suppress(ConnectionError):
        for _ in range(mebibytes):
            connection.sendall(bytes(MEBIBYTE))


def damaged(said: bytes, generator: random.Random) -> bytes:
    """`said` with one to four changes."""
    text = bytearray(said)
    for _ in range(generator.randrange(1, 5)):
        at = generator.randrange(len(text)) if text else 0
        change = generator.randrange(6)
        if change == 0:
            text[at : at + 1] = generator.randbytes(1)
        elif change == 1:
            del text[at:]
        elif change == 2:
            del text[at : at + generator.randrange(1, 40)]
        elif change == 3:
            text[at:at] = generator.randbytes(generator.randrange(1, 200))
        elif change == 4:
            text[at:at] = text[at : at + generator.randrange(1, 100)]
        else:
            length = generator.choice((0, 255, MEBIBYTE, GIBIBYTE, (1 << 63) - 1, (1 << 64) - 1))
            text[at:at] = bytes([generator.choice((2, 3, 4, 6))]) + struct.pack(">Q", length)
    return bytes(text)


class UnauthenticatedClients:
    """Visits some ports again and again, until a visit is over; then no connection of theirs is open."""

    def __init__(self, addresses: Sequence[tuple[str, int]], seed: int) -> None:
        self.connections = 0
        self._addresses, self._generator = addresses, random.Random(f"unauthenticated {seed}")

    @contextmanager
    def visiting(self) -> Iterator[None]:
        end = threading.Event()
        thread = threading.Thread(target=self._visit, args=(end,), name="unauthenticated", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _visit(self, end: threading.Event) -> None:
        slow: list[socket.socket] = []
        generator = self._generator
        while not end.wait(generator.uniform(*_PAUSE_S)):
            address = generator.choice(self._addresses)
            self.connections += 1
            kind = generator.random()
            if kind < 0.1:
                slow.append(connect(address, GREETING[: generator.randrange(len(GREETING))]))
                if len(slow) > _SLOW:
                    slow.pop(0).close()
            elif kind < 0.15:
                with connect(
                    address, GREETING + generator.choice((LONG_COMMAND, LONG_MESSAGE))
                ) as connection:
                    send_much(connection)
            elif kind < 0.5:
                connect(address, generator.choice(SCANS)).close()
            else:
                connect(address, damaged(GREETING + _HELLO, generator)).close()
        for connection in slow:
            connection.close()
