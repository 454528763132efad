"""See and steer a process that runs on the simulated Ascend: this one or another one.

    with Simulator(pid) as simulator, simulator.hold("HcclRecv", count=1) as gate:
        ...
        gate.wait_until_held()
        print(simulator.listing())

Patterns are those of `fnmatch(3)`, for the names of tasks: "HcclSend", "memcpy D2H", "event wait", "aten::*".
What the answers mean is in `cann/control.cpp` and `cann/listing.cpp`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, TypeVar

import msgspec

ANSWER_LIMIT_S = 20.0
HELD_LIMIT_S = 30.0
ENTRIES = 20_000  # of the history, in one answer (`entries_in_one_answer` of cann/listing.cpp)

Answer = TypeVar("Answer")


class Partners(msgspec.Struct, frozen=True):
    """Of an HCCL operation."""

    communicator: str  # equal on all its members
    operation: str  # "send", "receive", "batch", "join" or the name of a collective
    pids: list[int]  # who must do something before the operation can end
    unknown: int = 0  # how many more must: they have not joined the communicator, so nobody knows their pids


class Wait(msgspec.Struct, frozen=True):
    """A thread, of a stream or of the host, that stands still in the simulator."""

    thread: int
    thread_name: str  # "acl_thread" is the one that empties torch_npu's task queue
    reason: str
    partners: Partners | None = None
    task: int | None = None  # of the same process, which must end first


class Contained(msgspec.Struct, frozen=True):
    """A task of a graph."""

    name: str
    partners: Partners | None = None


class Task(msgspec.Struct, frozen=True):
    number: int  # unique in its process, and greater than those of all tasks that were queued earlier
    name: str
    partners: Partners | None = None
    waiting: Wait | None = None
    contains: list[Contained] = []
    """The HCCL operations of a graph, if this is a replay of one. All tasks of a replay that runs are on the
    streams of the graph."""


class Stream(msgspec.Struct, frozen=True):
    stream: int
    device: int
    queued: list[Task]
    running: Task | None
    ended: int
    error: int | None = None  # what a task failed with; nothing runs after it
    graph: int | None = None  # whose stream it is; None: it is of the program

    @property
    def busy(self) -> bool:
        return self.running is not None or bool(self.queued)


class GateState(msgspec.Struct, frozen=True):
    gate: int
    pattern: str
    holds: int  # tasks that stand at it now


class Links(msgspec.Struct, frozen=True):
    """Of the messages that a process sends."""

    us_per_message: int = 0
    mb_per_s: int = 0  # 0: no limit
    eager_bytes: int = 0  # up to how many bytes a send needs no receiver


class Listing(msgspec.Struct, frozen=True):
    """What a process is doing. Streams that never had a task are left out."""

    pid: int
    streams: list[Stream]
    host: list[Wait]
    gates: list[GateState] = []
    links: Links = Links()

    def stream(self, number: int) -> Stream:
        """That stream; idle if it never had a task."""
        found = [stream for stream in self.streams if stream.stream == number]
        return found[0] if found else Stream(number, -1, [], None, 0)

    def __str__(self) -> str:
        return "\n".join([f"process {self.pid}", *(f"  {line}" for line in self._lines())])

    def _lines(self) -> Iterator[str]:
        for stream in self.streams:
            queued = ", ".join(task.name for task in stream.queued) or "nothing"
            running = "idle" if stream.running is None else stream.running.name
            if stream.running is not None and stream.running.waiting is not None:
                running += f" ({stream.running.waiting.reason})"
            failed = "" if stream.error is None else f", failed with {stream.error}"
            name = f"{stream.stream}" if stream.graph is None else f"{stream.stream} of graph {stream.graph}"
            yield f"stream {name}: {running}; queued: {queued}; {stream.ended} ended{failed}"
        for wait in self.host:
            yield f"host thread {wait.thread} ({wait.thread_name}): {wait.reason}"


class Entry(msgspec.Struct, frozen=True):
    """One moment of one task."""

    number: int
    stream: int
    device: int
    event: Literal["queued", "began", "ended"]
    task: str  # its name
    task_number: int


class History(msgspec.Struct, frozen=True):
    entries: list[Entry]
    lost: int  # older entries that were asked for and are forgotten
    next: int  # the number of the entry that comes next


class SimulatorError(Exception):
    """The process does not answer, or does not understand."""


class Gate:
    """Holds tasks that are about to run. As a context manager it opens at the end."""

    def __init__(self, simulator: Simulator, number: int, pattern: str) -> None:
        self.number = number
        self._simulator, self._pattern = simulator, pattern
        self._open = False

    @property
    def holds(self) -> int:
        """How many tasks stand at the gate."""
        gates = self._simulator.listing().gates
        return next((gate.holds for gate in gates if gate.gate == self.number), 0)

    def wait_until_held(self, limit_s: float = HELD_LIMIT_S, *, tasks: int = 1) -> None:
        """Return when so many tasks stand at the gate."""
        deadline = time.monotonic() + limit_s
        while self.holds < tasks:
            if time.monotonic() > deadline:
                raise SimulatorError(
                    f"fewer than {tasks} tasks {self._pattern!r} at the gate after {limit_s:g} s:\n"
                    f"{self._simulator.listing()}"
                )
            time.sleep(0.005)

    def release(self) -> None:
        """Let the tasks run, and hold no more. Does nothing the second time."""
        if not self._open:
            self._open = True
            self._simulator.ask("release", str(self.number))

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(ConnectionError):  # a test may have killed the process
            self.release()


class Simulator:
    """A connection to the control socket of a process, which exists from its first use of a device on."""

    def __init__(self, pid: int | None = None) -> None:
        self.pid = os.getpid() if pid is None else pid
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_LIMIT_S)
        try:
            self._socket.connect(f"\0ascend-sim-{self.pid}")
        except OSError as error:
            self._socket.close()
            raise SimulatorError(
                f"process {self.pid} serves no simulated Ascend (from its first use of a device on it does)"
            ) from error
        self._answers = self._socket.makefile("rb")

    def listing(self) -> Listing:
        """What every stream and every blocked host thread does now."""
        return self._ask_for(Listing, "list")

    def history(self, start: int = 0) -> History:
        """Everything that happened from the entry `start` until now, in order."""
        parts = [self._ask_for(History, "history", str(start))]
        while len(parts[-1].entries) == ENTRIES:  # a busy process never has nothing new to tell
            parts.append(self._ask_for(History, "history", str(parts[-1].next)))
        return History(
            [entry for part in parts for entry in part.entries],
            sum(part.lost for part in parts),
            parts[-1].next,
        )

    def hold(self, pattern: str, count: int | None = None) -> Gate:
        """Close a gate for the next `count` tasks with such a name that are about to run (None: for all).

        Tasks that were queued before but have not begun count too.
        """
        words = [pattern] if count is None else [pattern, str(count)]
        return Gate(self, self.ask("hold", *words)["gate"], pattern)

    def delay(self, pattern: str, microseconds: int) -> None:
        """Let every task with such a name take that much longer; 0 takes the rule of this pattern away."""
        self.ask("delay", pattern, str(microseconds))

    def links(self, *, us_per_message: int = 0, mb_per_s: int = 0, eager_bytes: int = 0) -> None:
        """Set the `Links` of this process."""
        self.ask("links", str(us_per_message), str(mb_per_s), str(eager_bytes))

    def ask(self, *words: str) -> Any:
        """One request, and its answer as plain Python values."""
        return self._ask_for(dict, *words)

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ask_for(self, kind: type[Answer], *words: str) -> Answer:
        line = _line_of(words)
        try:
            self._socket.sendall(line)
            answer = self._answers.readline()
        except TimeoutError as error:
            raise SimulatorError(f"process {self.pid}: no answer within {ANSWER_LIMIT_S:g} s") from error
        if not answer.endswith(b"\n"):
            raise ConnectionError(f"process {self.pid} has ended")
        if answer.startswith(b'{"error":'):
            raise SimulatorError(f"process {self.pid}: {msgspec.json.decode(answer)['error']}")
        return msgspec.json.decode(answer, type=kind)


def _line_of(words: Sequence[str]) -> bytes:
    """A request. A pattern may contain spaces, as "memcpy D2H" does: `?` stands for them."""
    return (" ".join(word.replace(" ", "?") for word in words) + "\n").encode()
