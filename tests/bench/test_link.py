"""The emulated link: what it is asked for is what packets meet. Needs root; real namespaces, real packets."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from scripts.bench.link import EmulatedLink, LinkError, Loopback, reason_for_loopback

needs_root = pytest.mark.skipif(bool(reason_for_loopback()), reason=reason_for_loopback())
Result = TypeVar("Result")
LIMIT_S = 20.0
# Answers every message of 4 + n bytes with one byte; the first 4 bytes say n.
ECHO = """
import socket, struct, sys
server = socket.create_server((sys.argv[1], 0))
print(server.getsockname()[1], flush=True)
peer, _ = server.accept()
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while head := peer.recv(4, socket.MSG_WAITALL):
    left = struct.unpack("<I", head)[0]
    while left:
        left -= len(peer.recv(min(left, 1 << 20)))
    peer.send(b"!")
"""


def alone(work: Callable[[], Result]) -> Result:
    """In a thread of its own, which ends: a link moves the thread that makes it into a namespace."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(timeout=60)


@contextmanager
def connected(link: EmulatedLink) -> Iterator[socket.socket]:
    """A connection from node 0 to `ECHO` on node 1."""
    address = link.variables(1)["SGLANG_HOST_IP"]
    command = [*link.prefix(1), sys.executable, "-c", ECHO, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as echo:
        try:
            assert echo.stdout is not None
            port = int(echo.stdout.readline())
            with socket.create_connection((address, port), timeout=LIMIT_S) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield connection
        finally:
            echo.kill()


def round_trip_s(connection: socket.socket, size: int = 0) -> float:
    began = time.monotonic()
    connection.sendall(size.to_bytes(4, "little") + bytes(size))
    assert connection.recv(1) == b"!"
    return time.monotonic() - began


def namespaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


@needs_root
def test_a_message_takes_the_delay_there_and_back(tmp_path: Path) -> None:
    def measure() -> list[float]:
        with EmulatedLink(tmp_path) as link, connected(link) as connection:
            round_trip_s(connection)  # resolves addresses
            found = []
            for delay_ms in (40, 0):
                link.set(delay_ms, 0)
                found.append(min(round_trip_s(connection) for _ in range(3)))
            return found

    delayed, undelayed = alone(measure)
    assert delayed >= 2 * 0.040
    assert undelayed < delayed


@needs_root
def test_bytes_take_the_time_of_the_rate(tmp_path: Path) -> None:
    size, rate_mbit = 250_000, 20.0

    def measure() -> float:
        with EmulatedLink(tmp_path) as link, connected(link) as connection:
            link.set(0, rate_mbit)
            return round_trip_s(connection, size)

    assert alone(measure) >= 0.95 * size * 8 / (rate_mbit * 1e6)  # the first burst may find an idle link


@needs_root
@pytest.mark.parametrize("lost_from", [{0}, {1}, {0, 1}], ids=str)
def test_what_a_node_sends_can_be_lost(tmp_path: Path, lost_from: set[int]) -> None:
    def measure() -> float:
        with EmulatedLink(tmp_path) as link, connected(link) as connection:
            round_trip_s(connection)
            link.set(0, 0, lost_from=lost_from)
            connection.settimeout(0.1)
            with pytest.raises(TimeoutError):
                round_trip_s(connection)
            link.set(0, 0)
            connection.settimeout(LIMIT_S)
            assert connection.recv(1) == b"!"  # TCP sends again what was lost
            return round_trip_s(connection)

    assert alone(measure) < LIMIT_S


@needs_root
def test_nothing_is_left_behind_not_even_by_an_error(tmp_path: Path) -> None:
    before = namespaces()

    def fail() -> None:
        with EmulatedLink(tmp_path):
            assert namespaces() > before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        alone(fail)
    assert namespaces() == before


@needs_root
def test_without_a_compiler_and_netem_one_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = namespaces()
    monkeypatch.setattr("scripts.bench.link.shutil.which", lambda name: None)
    monkeypatch.setattr(EmulatedLink, "_join_with_netem", lambda self: False)
    with pytest.raises(LinkError, match="no C compiler"):
        alone(lambda: EmulatedLink(tmp_path).__enter__())
    assert namespaces() == before


def test_loopback_refuses_what_it_cannot_do() -> None:
    Loopback().set(0, 0)
    with pytest.raises(LinkError, match="no delay"):
        Loopback().set(1, 0)
