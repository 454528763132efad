"""The recorded order of posts, waits and launches, for tests and timelines.

Off by default: `Trace.record` then costs one attribute test. What is recorded is order and time, never
payload. Asynchrony is a claim about order, so order is what the tests assert.

What a rank recorded becomes one file that Perfetto and chrome://tracing load (see `chrome_trace.py`). The
events stand in it as they were recorded, too; that is what `read_trace` reads.

| event | when |
|---|---|
| iteration | the scheduler begins an iteration, before it receives requests |
| post, wait, ready | a receive is posted; the program waits for it; it has the message, tensors included |
| arrive | a message has come in, whatever the program does |
| push, full | a message has left on the host lane; its window or its slots are full, and the sender waits |
| post_send, post_receive | tensors have been handed to the device lane; their receive has been posted |
| launch, launched | a forward is about to be launched, and has been; on CPU it has then been computed |
| chunk_queued, chunk_taken | a KV chunk was handed to the transfer engine; it may be read now |
| run, ran | a device began and ended the forward; recorded later, with the time at which it was |
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from .chrome_trace import chrome_events
from .telemetry import file_name
from .whole_file import write_whole

SUFFIX = ".trace.json"


class Event(NamedTuple):
    """One thing that a rank did."""

    time_ns: int  # time.monotonic_ns of this node
    name: str  # see the table above
    kind: str  # message kind, or "" where there is none
    slot: int  # microbatch slot, -1 where there is none
    iteration: int  # scheduler iteration, -1 where there is none


class Trace:
    """A bounded list of events of one rank, the oldest dropped first."""

    def __init__(self, enabled: bool = False, capacity: int = 1 << 18) -> None:
        self.enabled = enabled
        # Plain tuples of numbers and strings, which the garbage collector does not have to visit.
        self._events: deque[tuple[int, str, str, int, int]] = deque(maxlen=capacity)

    def record(self, name: str, kind: str = "", slot: int = -1, iteration: int = -1) -> None:
        if self.enabled:
            self._events.append((time.monotonic_ns(), name, kind, slot, iteration))

    def record_at(self, time_ns: int, name: str, slot: int, iteration: int) -> None:
        """Record something of which the time is only known later."""
        if self.enabled:
            self._events.append((time_ns, name, "", slot, iteration))

    def events(self) -> list[Event]:
        return [Event(*event) for event in list(self._events)]


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded until it was written."""

    stage: int
    rank: int
    offset_ns: int  # leads from the times of this node to those of stage 0's
    written_ns: int  # time.monotonic_ns of this node
    events: list[Event]
    replica: int | None = None  # of data-parallel ones that each have a stage 0 and a rank 0

    @classmethod
    def of(cls, trace: Trace, stage: int, rank: int, offset_ns: int, replica: int | None = None) -> RankTrace:
        return cls(stage, rank, offset_ns, time.monotonic_ns(), trace.events(), replica)

    def on_stage_0(self) -> list[Event]:
        """The events, with the times of stage 0's clock."""
        return [event._replace(time_ns=event.time_ns + self.offset_ns) for event in self.events]

    def write(self, directory: Path) -> Path:
        """Write `file_name(...).trace.json`, whole or not at all, and return its path."""
        path = directory / f"{file_name(self.stage, self.rank, self.replica)}{SUFFIX}"
        # Perfetto reads no further than the first key that it does not know: the recorded events come last.
        content = {"traceEvents": chrome_events(self), "recorded": self}
        write_whole(path, msgspec.json.encode(content))
        return path


class _File(msgspec.Struct):
    recorded: RankTrace


_DECODER = msgspec.json.Decoder(_File)


def read_trace(path: Path) -> RankTrace:
    """What `RankTrace.write` wrote. Raises ValueError, naming the file, when it is something else."""
    try:
        return _DECODER.decode(path.read_bytes()).recorded
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a trace that sglang-npu-pp wrote: {error}.") from None


def read_traces(directory: Path, rank: int = 0, replica: int = 0) -> list[RankTrace]:
    """The traces of one rank of every stage, by stage.

    `replica`: of which data-parallel one. A server without them is its own replica 0.
    """
    paths = list(directory.glob(file_name("*", rank, replica) + SUFFIX))
    if not paths and replica == 0:
        paths = list(directory.glob(file_name("*", rank, None) + SUFFIX))
    return sorted(map(read_trace, paths), key=lambda trace: trace.stage)
