"""Holding tasks of a process's simulated device, and waiting until nothing moves any more."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from ascend_sim.controls import Listing, Simulator

LIMIT_S = 60.0
POLL_S = 0.005


class Process(Protocol):
    """A rank of a team, or a scheduler."""

    @property
    def pid(self) -> int: ...


@contextmanager
def holding(rank: Process, pattern: str) -> Iterator[None]:
    """Tasks with such a name do not begin on this rank's streams inside the block."""
    with Simulator(rank.pid) as simulator, simulator.hold(pattern):
        yield


def position(rank: Process) -> int:
    """Where the history of this rank's streams stands."""
    with Simulator(rank.pid) as simulator:
        return simulator.history().next


def ended(rank: Process, task: str, start: int) -> int:
    """How many tasks of that name have ended since `start`."""
    with Simulator(rank.pid) as simulator:
        entries = simulator.history(start).entries
    return sum(entry.event == "ended" and entry.task == task for entry in entries)


def at_rest(*some: Process) -> None:
    """Wait until every stream of these ranks is empty, or stands still because its task waits for something.

    Twice in a row and with nothing ended in between, so that a task between two waits is not taken for rest.
    """
    deadline = time.monotonic() + LIMIT_S
    before: list[Listing] = []
    with ExitStack() as connections:
        simulators = [connections.enter_context(Simulator(rank.pid)) for rank in some]
        while True:
            now = [simulator.listing() for simulator in simulators]
            if now == before and all(_stands_still(listing) for listing in now):
                return
            assert time.monotonic() < deadline, "no rest:\n" + "\n".join(map(str, now))
            before = now
            time.sleep(POLL_S)


def _stands_still(listing: Listing) -> bool:
    return all(
        stream.running.waiting is not None if stream.running else not stream.queued
        for stream in listing.streams
    )
