"""TCP ports that are free and stay so: for servers that are told a port and bind it seconds later."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

HOST = "127.0.0.1"
OF_THE_KERNEL = Path("/proc/sys/net/ipv4/ip_local_port_range")  # from which connections get theirs
HOW_MANY = 12_000  # from which to choose
TRIES = 200

# Ports that SGLang derives from --port, where attention is data-parallel.
DERIVED_FROM_PORT = (13, *range(233, 240))

_reserved: list[socket.socket] = []


def free_ports(count: int, *, with_also: Collection[int] = ()) -> list[int]:
    """Free ports of the loopback interface, reserved for this process until it ends.

    They are none of those that the kernel gives to connections: until a server binds its port, dozens of
    connections are opened. Reserved by a name that only one process can have, so that no other caller of this
    function gets them. `with_also`: what must be free and reserved too, as distances from each port.

    Raises:
        OSError: there are none among 200.
    """
    found: list[int] = []
    usable = candidates()
    usable = usable[: len(usable) - max(with_also, default=0)]
    for port in random.sample(usable, k=min(TRIES, len(usable))):
        if len(found) < count and _reserve([port, *(port + distance for distance in with_also)]):
            found.append(port)
    if len(found) < count:
        raise OSError(f"no {count} free ports among {TRIES} of {HOST}; end programs that listen on many")
    return found


def why_not_free(port: int, host: str = HOST) -> str:
    """Why a server could not listen on a port; "" where it could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def candidates(of_the_kernel: Path = OF_THE_KERNEL) -> range:
    """Below the kernel's ports, which begin at 32768 by default, or above where there is no room below."""
    first, last = map(int, of_the_kernel.read_text().split())
    if first > 1024 + HOW_MANY:
        return range(first - HOW_MANY, first)
    return range(last + 1, 65536) if last < 65536 - TRIES else range(1024, 65536)


def _reserve(ports: Iterable[int]) -> bool:
    """All of them or none. A name is an abstract Unix socket: it has no file, and goes with its process."""
    with ExitStack() as stack:
        names = []
        for port in ports:
            names.append(stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)))
            probe = stack.enter_context(socket.socket())
            try:
                names[-1].bind(f"\0sglang-npu-pp-port-{port}")
                probe.bind((HOST, port))
            except OSError:
                return False
        for name in names:
            _reserved.append(socket.socket(fileno=name.detach()))
    return True
