"""A rank's recorded events as Chrome trace events, the format that Perfetto loads.

A process is a stage and a thread is a row: one for each thing that a rank does, one for each microbatch slot.
Times are microseconds of stage 0's clock, so the files of several ranks can be opened together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trace import Event, RankTrace

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
    """Metadata ("M") that names the rows, slices ("X") and instants ("i"); `ts` and `dur` in microseconds."""
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
    """From a beginning to its end. What has not ended goes on until the trace was written: a stage that hangs
    shows where."""
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
    """How long a microbatch was in flight here: from its launch until its outputs were here, which on the
    last stage is when they left; a chunk of a prompt that has none, until the next launch in its slot."""
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
