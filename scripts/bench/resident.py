"""Servers that are all up at the same time, one awake while the others are frozen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol, TypeVar

from .competitors import Competitor

Say = Callable[[str], None]


class Resident(Protocol):
    """One server."""

    competitor: Competitor
    pp: int

    def start(self) -> Any:
        """Start it, warm it up and freeze it."""

    def stop(self) -> None: ...


Server = TypeVar("Server", bound=Resident)


@contextmanager
def resident(servers: Iterable[Server], say: Say) -> Iterator[dict[Competitor, Server]]:
    """Start them one after another, and stop all of them in the end, whatever happens."""
    with ExitStack() as stack:
        up = {}
        for server in servers:
            began = time.monotonic()
            stack.callback(server.stop)
            server.start()
            up[server.competitor] = server
            say(f"pp {server.pp}: {server.competitor.name} is up after {time.monotonic() - began:.0f} s")
        yield up


def turns(servers: Mapping[Competitor, Server], round_number: int) -> list[Server]:
    """In this order the servers are visited: in odd rounds backwards, so that what drifts on the machine
    drifts for all of them."""
    return list(servers.values())[:: 1 if round_number % 2 == 0 else -1]
