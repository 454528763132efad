"""Recorded events, and the file that Perfetto loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sglang_npu_pp.observe.trace import Event, RankTrace, Trace, read_trace, read_traces

MS = 1_000_000  # ns
OFFSET_NS = 5_000 * MS

# One iteration of a middle stage in slot 1, and the beginning of the next, in which it hangs.
RECORDED = [
    Event(1 * MS, "iteration", "", 1, 9),
    Event(1 * MS, "post", "requests", -1, 9),
    Event(1 * MS, "wait", "requests", -1, 9),
    Event(2 * MS, "arrive", "requests", -1, 9),
    Event(2 * MS, "ready", "requests", -1, 9),
    Event(3 * MS, "post_receive", "proxy", 1, 9),
    Event(4 * MS, "launch", "", 1, 9),
    Event(8 * MS, "launched", "", 1, 9),
    Event(8 * MS, "full", "proxy", 1, 9),
    Event(10 * MS, "push", "proxy", 1, 9),
    Event(11 * MS, "post_send", "proxy", 1, 9),
    Event(14 * MS, "ready", "output", 1, 9),
    Event(15 * MS, "iteration", "", 0, 10),
    Event(16 * MS, "wait", "requests", -1, 10),
]


def written(folder: Path, stage: int = 1, rank: int = 0) -> Path:
    return RankTrace(stage, rank, OFFSET_NS, 20 * MS, RECORDED).write(folder)


def rows(events: list[dict[str, Any]]) -> dict[int, str]:
    return {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}


def shown(path: Path, phase: str) -> set[tuple[str, str, float, float]]:
    """(row, name, begin in ms, duration in ms) of the events of one phase."""
    events = json.loads(path.read_text())["traceEvents"]
    row = rows(events)
    chosen = [event for event in events if event["ph"] == phase]
    return {(row[e["tid"]], e["name"], e["ts"] / 1e3, e.get("dur", 0) / 1e3) for e in chosen}


def test_a_trace_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    trace = Trace(enabled=True)
    trace.record("push", "proxy", 1, 7)
    trace.record("launch", iteration=8)
    trace.record_at(5, "run", 1, 7)
    path = RankTrace.of(trace, 2, 3, OFFSET_NS).write(tmp_path)
    assert path.name == "stage2-rank3.trace.json"
    read = read_trace(path)
    assert read.events == trace.events()
    assert (read.stage, read.rank, read.offset_ns) == (2, 3, OFFSET_NS)
    assert read.written_ns >= read.events[1].time_ns
    assert [event[1:] for event in read.events] == [
        ("push", "proxy", 1, 7),
        ("launch", "", -1, 8),
        ("run", "", 1, 7),
    ]
    assert [event.time_ns - OFFSET_NS for event in read.on_stage_0()] == [e.time_ns for e in read.events]


def test_a_trace_that_is_off_keeps_nothing_and_one_that_is_full_drops_the_oldest() -> None:
    off, full = Trace(), Trace(enabled=True, capacity=2)
    for number in range(3):
        off.record("push", iteration=number)
        off.record_at(0, "run", 0, number)
        full.record("push", iteration=number)
    assert off.events() == []
    assert [event.iteration for event in full.events()] == [1, 2]


def test_the_traces_of_a_rank_come_in_the_order_of_stages(tmp_path: Path) -> None:
    for stage, rank in ((10, 0), (2, 0), (0, 0), (0, 1)):
        written(tmp_path, stage, rank)
    assert [(trace.stage, trace.rank) for trace in read_traces(tmp_path)] == [(0, 0), (2, 0), (10, 0)]
    assert [(trace.stage, trace.rank) for trace in read_traces(tmp_path, rank=1)] == [(0, 1)]


@pytest.mark.parametrize("content", ["", "{}", '{"recorded": {"events": [[1]]}}', '{"recorded": 1}'])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "stage0-rank0.trace.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"stage0-rank0\.trace\.json is not a trace"):
        read_trace(path)


def test_replicas_are_processes_of_their_own_in_a_viewer(tmp_path: Path) -> None:
    """Their files can be opened together."""
    shown = {}
    for replica in (None, 0, 1):
        path = RankTrace(1, 0, OFFSET_NS, 20 * MS, RECORDED, replica).write(tmp_path)
        events = json.loads(path.read_text())["traceEvents"]
        (pid,) = {event["pid"] for event in events}
        (shown[pid, replica],) = (e["args"]["name"] for e in events if e["name"] == "process_name")
    assert shown == {(1, None): "stage 1", (1, 0): "replica 0 stage 1", (1001, 1): "replica 1 stage 1"}


def test_slices_are_on_stage_0s_clock_and_what_did_not_end_goes_on(tmp_path: Path) -> None:
    assert shown(written(tmp_path), "X") == {
        ("iteration", "9", 5001, 14),
        ("iteration", "10", 5015, 5),
        ("waited", "requests", 5001, 1),
        ("waited", "requests", 5016, 4),
        ("launch", "9", 5004, 4),
        ("back-pressure", "proxy", 5008, 2),
        ("slot 1", "9", 5004, 10),
    }


def test_posts_arrivals_and_sends_are_instants(tmp_path: Path) -> None:
    assert shown(written(tmp_path), "i") == {
        ("posted", "requests", 5001, 0),
        ("posted", "proxy tensors", 5003, 0),
        ("arrived", "requests", 5002, 0),
        ("sent", "proxy", 5010, 0),
        ("sent", "proxy tensors", 5011, 0),
    }


def test_a_chunk_without_outputs_is_in_flight_until_the_next_launch_in_its_slot(tmp_path: Path) -> None:
    launches = [Event(t * MS, "launch", "", slot, t) for t, slot in ((1, 0), (2, 1), (4, 0))]
    path = RankTrace(0, 0, 0, 20 * MS, launches).write(tmp_path)
    assert ("slot 0", "1", 1, 3) in shown(path, "X")


def test_a_forward_on_a_device_has_a_row_of_its_own(tmp_path: Path) -> None:
    recorded = [
        Event(1 * MS, "launch", "", 0, 3),
        Event(2 * MS, "launched", "", 0, 3),
        Event(9 * MS, "iteration", "", 1, 4),
        Event(1 * MS, "run", "", 0, 3),
        Event(7 * MS, "ran", "", 0, 3),
    ]
    path = RankTrace(0, 0, 0, 9 * MS, recorded).write(tmp_path)
    assert {("launch", "3", 1, 1), ("run on device", "3", 1, 6)} <= shown(path, "X")


def test_the_file_is_what_perfetto_loads(tmp_path: Path) -> None:
    """Its reader takes complete (X), instant (i) and metadata (M) events, `ts` and `dur` in microseconds. It
    ends at the first key of the file that it does not know, and wants no arrays inside an event."""
    text = written(tmp_path, stage=1, rank=2).read_text()
    assert text.startswith('{"traceEvents":[{')
    events = json.loads(text)["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "i", "M"}
    named = rows(events)
    for event in events:
        assert event["pid"] == 1
        assert all(not isinstance(value, list) for value in event.values())
        if event["ph"] != "M":
            assert event["tid"] > 0
            assert event["ts"] >= 5_000_000
            assert named[event["tid"]].endswith(
                ", rank 2"
            )  # several ranks of a stage can be looked at together
            assert event["ph"] == "i" or event["dur"] > 0
