"""Find deadlocks among processes on the simulated Ascend, in what their streams and host threads wait for.

A stream stands still in its running task, a host thread in a blocking call. What they wait for:

- a task of the same process (synchronising, an event): the stream that has it, running or queued;
- an operation of another process: the stream that has the matching one queued, behind whatever runs there,
  alone or in a graph;
  nobody when the matching one runs already; and those who would call it when it is not there yet;
- members that have yet to join a communicator: the main threads of those that have not.

Who waits for somebody that is stuck is stuck. A gate, a delay or a process that is busy elsewhere is not: it
may end. What a process has not called yet is believed to come from its main thread, through torch_npu's task
queue, and from no other thread.

Not found: two batches that both only send, or both only receive; a listing does not tell directions.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from ascend_sim.controls import Listing, Partners, Simulator, SimulatorError, Stream, Task, Wait

POLL_S = 0.05

TASK_QUEUE = "acl_thread"  # what torch_npu calls the thread that empties it

# Operations that end together with the one named; all others end with one of their own name.
COUNTERPARTS: Mapping[str, tuple[str, ...]] = {
    "send": ("receive", "batch"),
    "receive": ("send", "batch"),
    "batch": ("batch", "send", "receive"),
}


class Place(NamedTuple):
    """Where something stands still: a stream of a process, or a host thread of it."""

    pid: int
    kind: str  # "stream" or "host thread"
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number} of process {self.pid}"


@dataclass(frozen=True)
class Blocked:
    """One who waits, and for whom. The same one later is equal, while it is in the same task."""

    at: Place
    doing: str  # the name of a task, or what a host thread is in
    task: int | None  # the number of that task
    needs: Place
    because: str  # what connects the two

    def __str__(self) -> str:
        return f"{self.at}, in {self.doing}, waits for {self.needs}: {self.because}"


@dataclass(frozen=True)
class Deadlock:
    """A cycle of waits: each waits for the next one, and the last one for the first."""

    cycle: tuple[Blocked, ...]

    @property
    def pids(self) -> set[int]:
        return {blocked.at.pid for blocked in self.cycle}

    @property
    def tasks(self) -> list[str]:
        """The names of what stands still, in the order of the cycle."""
        return [blocked.doing for blocked in self.cycle]

    def __str__(self) -> str:
        processes = ", ".join(map(str, sorted(self.pids)))
        return "\n".join([f"deadlock (process {processes}):", *(f"  {blocked}" for blocked in self.cycle)])


class _Need(NamedTuple):
    place: Place
    because: str


# Of each group one is enough, but one of every group has to move.
_Needs: TypeAlias = list[list[_Need]]


def deadlock_among(pids: Iterable[int], limit_s: float) -> Deadlock | None:
    """Look at the processes until they are in a deadlock; None when they are not within the limit.

    A deadlock is believed when two listings in a row show the same one. A process that serves no simulator,
    not yet or no longer, is not looked at.
    """
    watched = list(pids)
    deadline = time.monotonic() + limit_s
    before: Deadlock | None = None
    while True:
        now = find_deadlock(listings_of(watched))
        if now is not None and now == before:
            return now
        before = now
        if time.monotonic() > deadline:
            return None
        time.sleep(POLL_S)


def listings_of(pids: Iterable[int]) -> list[Listing]:
    """Of those processes that serve a simulator."""
    listings = []
    for pid in pids:
        try:
            with Simulator(pid) as simulator:
                listings.append(simulator.listing())
        except (SimulatorError, OSError):
            continue
    return listings


def find_deadlock(listings: Sequence[Listing]) -> Deadlock | None:
    """A cycle of waits in listings of several processes, or None.

    The listings are made one after the other, so what a single set of them shows may be over already.
    """
    return _Search(listings).deadlock()


class _Search:
    def __init__(self, listings: Sequence[Listing]) -> None:
        self._listings = {listing.pid: listing for listing in sorted(listings, key=lambda each: each.pid)}
        self._doing: dict[Place, tuple[str, int | None]] = {}
        self._needs: dict[Place, _Needs] = {}
        for listing in listings:
            for stream in listing.streams:
                self._add_stream(listing, stream)
            for wait in listing.host:
                self._add_host_thread(listing, wait)

    def deadlock(self) -> Deadlock | None:
        stuck = self._stuck()
        if not stuck:
            return None
        # From anywhere, one stuck need after another, until it comes round.
        path: list[Place] = [min(stuck)]
        needs: list[_Need] = []
        while True:
            needs.append(self._stuck_need(path[-1], stuck))
            if needs[-1].place in path:
                break
            path.append(needs[-1].place)
        start = path.index(needs[-1].place)
        cycle = [
            Blocked(place, *self._doing[place], *need)
            for place, need in zip(path[start:], needs[start:], strict=True)
        ]
        first = min(range(len(cycle)), key=lambda index: cycle[index].at)  # the same cycle begins the same
        return Deadlock(tuple(cycle[first:] + cycle[:first]))

    def _stuck(self) -> set[Place]:
        """Believe all who wait to be stuck, and then not those who need nobody that is."""
        stuck = set(self._needs)
        while True:
            still = {place for place in stuck if any(_all_stuck(need, stuck) for need in self._needs[place])}
            if still == stuck:
                return stuck
            stuck = still

    def _stuck_need(self, place: Place, stuck: set[Place]) -> _Need:
        return next(group[0] for group in self._needs[place] if _all_stuck(group, stuck))

    def _add_stream(self, listing: Listing, stream: Stream) -> None:
        task = stream.running
        if task is None or task.waiting is None or stream.error is not None:
            return
        place = _place(listing, stream)
        of_graph = "" if stream.graph is None else f" in graph {stream.graph}"
        self._doing[place] = (task.name + of_graph, task.number)
        partners = task.waiting.partners
        if partners is None:
            self._needs[place] = self._for_task(listing, task.waiting)
        else:
            self._needs[place] = [
                needs for pid in partners.pids for needs in self._for_operation(listing.pid, partners, pid)
            ]

    def _add_host_thread(self, listing: Listing, wait: Wait) -> None:
        place = _host_place(listing, wait)
        self._doing[place] = (f"{wait.thread_name}: {wait.reason}", None)
        if wait.partners is None:
            self._needs[place] = self._for_task(listing, wait)
        else:
            self._needs[place] = self._for_members(listing.pid, wait.partners)

    def _for_task(self, listing: Listing, wait: Wait) -> _Needs:
        """A task of the same process has to end."""
        for stream in listing.streams:
            for task in _tasks(stream):
                if task.number == wait.task:
                    return [[_Need(_place(listing, stream), f"{wait.reason}; {_whereabouts(task, stream)}")]]
        return []

    def _for_operation(self, pid: int, partners: Partners, peer: int) -> _Needs:
        """A process has to do its part of an HCCL operation."""
        listing = self._listings.get(peer)
        if listing is None:
            return []
        found = _matching(listing, partners, pid)
        if found is None:
            names = " or ".join(COUNTERPARTS.get(partners.operation, (partners.operation,)))
            because = f"no {names} for {partners.communicator} was called there"
            return [[_Need(place, because)] for place in _callers(listing)]
        task, stream = found
        if task == stream.running:
            return []
        return [[_Need(_place(listing, stream), _whereabouts(task, stream))]]

    def _for_members(self, pid: int, partners: Partners) -> _Needs:
        """Members have to join a communicator. Some may be unknown: any process that has not joined it."""
        because = f"it has not joined {partners.communicator}"
        absent = [
            listing
            for listing in self._listings.values()
            if listing.pid != pid and not _has_joined(listing, partners)
        ]
        known = [listing for listing in absent if listing.pid in partners.pids]
        others = [listing for listing in absent if listing not in known]
        if partners.unknown >= len(others):  # all of them have to come
            known, others = absent, []
        needs = [[_Need(place, because)] for listing in known for place in _main_thread(listing)]
        blocked = [_main_thread(listing) for listing in others]
        if partners.unknown > 0 and others and all(blocked):  # some of them have to
            needs.append([_Need(place, because) for places in blocked for place in places])
        return needs


def _all_stuck(group: Sequence[_Need], stuck: set[Place]) -> bool:
    return bool(group) and all(need.place in stuck for need in group)


def _place(listing: Listing, stream: Stream) -> Place:
    return Place(listing.pid, "stream", stream.stream)


def _host_place(listing: Listing, wait: Wait) -> Place:
    return Place(listing.pid, "host thread", wait.thread)


def _main_thread(listing: Listing) -> list[Place]:
    """The main thread of a process, if it stands still."""
    return [_host_place(listing, wait) for wait in listing.host if wait.thread == listing.pid][:1]


def _callers(listing: Listing) -> list[Place]:
    """Those who stand still of the threads that an operation comes through, before it is on its stream."""
    queues = [_host_place(listing, wait) for wait in listing.host if wait.thread_name == TASK_QUEUE]
    return _main_thread(listing) + queues


def _has_joined(listing: Listing, partners: Partners) -> bool:
    return any(
        wait.partners is not None
        and wait.partners.operation == partners.operation
        and wait.partners.communicator == partners.communicator
        for wait in listing.host
    )


def _tasks(stream: Stream) -> Iterator[Task]:
    if stream.running is not None:
        yield stream.running
    yield from stream.queued


def _matching(listing: Listing, partners: Partners, pid: int) -> tuple[Task, Stream] | None:
    """The oldest task of a process that is the other side of an operation of process `pid`.

    One that waits in a graph comes after all others: the tasks of a replay that runs have later numbers than
    the replays that are queued.
    """
    names = COUNTERPARTS.get(partners.operation, (partners.operation,))

    def matches(other: Partners | None) -> bool:
        return (
            other is not None
            and other.communicator == partners.communicator
            and other.operation in names
            and pid in other.pids
        )

    tasks = [(task, stream) for stream in listing.streams for task in _tasks(stream)]
    found = [(task, stream) for task, stream in tasks if matches(task.partners)]
    found = found or [
        (Task(task.number, f"{inner.name} in {task.name}"), stream)
        for task, stream in tasks
        if task != stream.running
        for inner in task.contains
        if matches(inner.partners)
    ]
    return min(found, key=lambda pair: pair[0].number, default=None)


def _whereabouts(task: Task, stream: Stream) -> str:
    if task == stream.running:
        return f"{task.name} runs on stream {stream.stream}"
    head = "nothing" if stream.running is None else stream.running.name
    return f"{task.name} is queued on stream {stream.stream} behind {head}"
