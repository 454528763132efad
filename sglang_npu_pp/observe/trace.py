"""Trace: recorded order of posts, waits and launches, for tests and timelines; never payload.

Off by default; `Trace.record` then costs one attribute test. One file per rank, for Perfetto and
`read_trace`.

| event | when |
|---|---|
| iteration | start of a scheduler iteration, before requests are received |
| post, wait, ready | a receive is posted; its wait begins; message and tensors are there |
| arrive | a message has arrived, independent of any wait |
| push, full | a message was pushed on the host lane; window or slots are full |
| post_send, post_receive | device lane: tensors handed over; receive posted |
| launch, launched | before and after the launch of a forward (on CPU: its computation) |
| chunk_queued, chunk_taken | a KV chunk was handed to the transfer engine; it may be read |
| run, ran | begin and end of the forward on the device, recorded later |
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .telemetry import file_name
from .whole_file import write_whole

SUFFIX = ".trace.json"


class Event(NamedTuple):
    """One recorded event."""

    time_ns: int  # time.monotonic_ns of this node
    name: str  # see the table above
    kind: str  # message kind, or "" where there is none
    slot: int  # microbatch slot, -1 where there is none
    iteration: int  # scheduler iteration, -1 where there is none


class Trace:
    """Ring buffer of one rank's events."""

    def __init__(self, enabled: bool = False, capacity: int = 1 << 18) -> None:
        self.enabled = enabled
        # Plain tuples of numbers and strings, which the garbage collector does not have to visit.
        self._events: deque[tuple[int, str, str, int, int]] = deque(maxlen=capacity)

    def record(self, name: str, kind: str = "", slot: int = -1, iteration: int = -1) -> None:
        if self.enabled:
            self._events.append((time.monotonic_ns(), name, kind, slot, iteration))

    def record_at(self, time_ns: int, name: str, slot: int, iteration: int) -> None:
        """Record an event whose time is known only later."""
        if self.enabled:
            self._events.append((time_ns, name, "", slot, iteration))

    def events(self) -> list[Event]:
        return [Event(*event) for event in list(self._events)]


@dataclass(frozen=True)
class RankTrace:
    """The trace of one rank, as written."""

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
        """The events, in times of stage 0's clock."""
        return [event._replace(time_ns=event.time_ns + self.offset_ns) for event in self.events]

    def write(self, directory: Path) -> Path:
        """Write `file_name(...).trace.json` atomically; return its path."""
        path = directory / f"{file_name(self.stage, self.rank, self.replica)}{SUFFIX}"
        # Perfetto reads no further than the first key that it does not know: the recorded events come last.
        content = {"traceEvents": chrome_events(self), "recorded": self}
        write_whole(path, msgspec.json.encode(content))
        return path


class _File(msgspec.Struct):
    recorded: RankTrace


_DECODER = msgspec.json.Decoder(_File)


def read_trace(path: Path) -> RankTrace:
    """Trace from a file of `RankTrace.write`. Raises ValueError, naming the file, for another."""
    try:
        return _DECODER.decode(path.read_bytes()).recorded
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a trace that sglang-npu-pp wrote: {error}.") from None


def read_traces(directory: Path, rank: int = 0, replica: int = 0) -> list[RankTrace]:
    """Traces of one rank of every stage, by stage.

    `replica`: the data-parallel one; 0 for a server without.
    """
    paths = list(directory.glob(file_name("*", rank, replica) + SUFFIX))
    if not paths and replica == 0:
        paths = list(directory.glob(file_name("*", rank, None) + SUFFIX))
    return sorted(map(read_trace, paths), key=lambda trace: trace.stage)


# --- Chrome trace events, the format that Perfetto loads -----------------------------------------
#
# A process is a stage and a thread is a row: one for each thing that a rank does, one for each microbatch
# slot. Times are microseconds of stage 0's clock, so the files of several ranks can be opened together.

ROWS = ("iteration", "launch", "run on device", "posted", "waited", "arrived", "sent", "back-pressure")
_ROWS_A_RANK = 1000  # thread ids of one rank: its rows, then its slots
_STAGES_A_REPLICA = 1000
_INSTANTS = {
    "post": "posted",
    "post_receive": "posted",
    "arrive": "arrived",
    "push": "sent",
    "post_send": "sent",
}
_BEGINNINGS = {
    "iteration": "iteration",
    "launch": "launch",
    "run": "run on device",
    "wait": "waited",
    "full": "back-pressure",
}
_ENDS = {
    "iteration": "iteration",  # ends the one before
    "launched": "launch",
    "ran": "run on device",
    "ready": "waited",
    "push": "back-pressure",
    "post_send": "back-pressure",
}


def chrome_events(trace: RankTrace) -> list[dict[str, Any]]:
    """Metadata ("M"), slices ("X") and instants ("i"); `ts` and `dur` in microseconds."""
    slices = [*_slices(trace), *_slots(trace), *_instants(trace)]
    used = {event["tid"] for event in slices}
    return [*_names(trace, used), *slices]


def _names(trace: RankTrace, used: set[int]) -> Iterator[dict[str, Any]]:
    def name(what: str, tid: int, **arguments: Any) -> dict[str, Any]:
        return {"ph": "M", "name": what, "pid": _pid(trace), "tid": tid, "args": arguments}

    stage = f"stage {trace.stage}"
    yield name("process_name", 0, name=stage if trace.replica is None else f"replica {trace.replica} {stage}")
    yield name("process_sort_index", 0, sort_index=_pid(trace))
    for tid in sorted(used):
        row = tid % _ROWS_A_RANK - 1
        label = ROWS[row] if row < len(ROWS) else f"slot {row - len(ROWS)}"
        yield name("thread_name", tid, name=label if trace.rank == 0 else f"{label}, rank {trace.rank}")
        yield name("thread_sort_index", tid, sort_index=tid)


def _pid(trace: RankTrace) -> int:
    return (trace.replica or 0) * _STAGES_A_REPLICA + trace.stage


def _tid(trace: RankTrace, row: str, slot: int = 0) -> int:
    """Never 0, which some viewers take for the idle task."""
    index = len(ROWS) + slot if row == "slot" else ROWS.index(row)
    return trace.rank * _ROWS_A_RANK + index + 1


def _instants(trace: RankTrace) -> Iterator[dict[str, Any]]:
    for event in trace.events:
        row = _INSTANTS.get(event.name)
        if row is not None:
            name = event.kind if event.name in ("post", "push", "arrive") else f"{event.kind} tensors"
            yield {"ph": "i", "s": "t", **_common(trace, event, row, name)}


def _slices(trace: RankTrace) -> Iterator[dict[str, Any]]:
    """From begin to end; open ones (a hanging stage) until the trace was written."""
    begun: dict[tuple[str, str], Event] = {}
    for event in trace.events:
        ends = _ENDS.get(event.name, "")
        began = begun.pop((ends, event.kind), None)
        if began is not None:
            yield _slice(trace, began, event.time_ns, ends)
        begins = _BEGINNINGS.get(event.name)
        if begins is not None:
            begun[begins, event.kind] = event
    for (row, _), began in begun.items():
        yield _slice(trace, began, trace.written_ns, row)


def _slots(trace: RankTrace) -> Iterator[dict[str, Any]]:
    """Microbatches in flight, from launch until outputs (on the last stage: sent); a prompt chunk without
    outputs until the next launch in its slot."""
    launched: dict[int, Event] = {}
    for event in trace.events:
        began = launched.get(event.slot)
        has_outputs = event.kind == "output" and event.name in ("ready", "push")
        if began is not None and (event.name == "launch" or has_outputs):
            del launched[event.slot]
            yield _slice(trace, began, event.time_ns, "slot", began.slot)
        if event.name == "launch":
            launched[event.slot] = event


def _slice(trace: RankTrace, began: Event, ended_ns: int, row: str, slot: int = 0) -> dict[str, Any]:
    name = began.kind or f"{began.iteration}"
    common = _common(trace, began, row, name, slot)
    return {"ph": "X", **common, "dur": (ended_ns - began.time_ns) / 1e3}


def _common(trace: RankTrace, event: Event, row: str, name: str, slot: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "cat": event.kind or row,
        "pid": _pid(trace),
        "tid": _tid(trace, row, slot),
        "ts": (event.time_ns + trace.offset_ns) / 1e3,
        "args": {"slot": event.slot, "iteration": event.iteration},
    }
