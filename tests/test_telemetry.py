"""Counters, and that what is written can be read again."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from sglang_npu_pp.observe.reporting import Reporter
from sglang_npu_pp.observe.telemetry import Telemetry, read_snapshots, render_table
from sglang_npu_pp.observe.trace import Trace, read_trace, read_traces
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport.clock import LinkClock


def filled(stage: int, rank: int) -> Telemetry:
    telemetry = Telemetry(stage, rank)
    telemetry.sending("proxy").messages = 3
    telemetry.sending("proxy").bytes = 3 << 20
    telemetry.receiving("output").wait_s = 0.25
    telemetry.sending("requests").backpressure_s = 0.5
    with telemetry.phase("forward"):
        pass
    return telemetry


def test_snapshots_are_read_back_in_the_order_of_stages(tmp_path: Path) -> None:
    written = [filled(stage, rank).snapshot() for stage, rank in ((1, 0), (0, 1), (0, 0))]
    for snapshot in written:
        snapshot.write(tmp_path)
    assert read_snapshots(tmp_path) == sorted(written, key=lambda s: (s.stage, s.rank))


def test_replicas_have_files_and_lines_of_their_own(tmp_path: Path) -> None:
    """Each has a stage 0 and a rank 0, and all of them write to one directory."""
    places = [(replica, stage, rank) for replica in (0, 1) for stage in (0, 1) for rank in (0, 1)]
    for replica, stage, rank in reversed(places):
        telemetry, trace = Telemetry(stage, rank, replica=replica), Trace(enabled=True)
        trace.record("push", iteration=10 * replica + stage)
        Reporter(Settings(telemetry_dir=tmp_path, trace_dir=tmp_path), telemetry, trace).report()
    read = read_snapshots(tmp_path)
    assert [snapshot.place for snapshot in read] == places
    assert len(list(tmp_path.iterdir())) == 2 * len(places)
    head, _, *lines = render_table(read).splitlines()
    assert head.split()[:3] == ["replica", "stage", "rank"]
    assert [tuple(map(int, line.split()[:3])) for line in lines] == places
    for replica in (0, 1):
        traces = read_traces(tmp_path, rank=1, replica=replica)
        assert [(one.replica, one.stage, one.rank) for one in traces] == [(replica, 0, 1), (replica, 1, 1)]
        assert [one.events[0].iteration for one in traces] == [10 * replica, 10 * replica + 1]


def test_a_server_without_replicas_is_its_own_first(tmp_path: Path) -> None:
    Reporter(Settings(trace_dir=tmp_path), Telemetry(0, 0), Trace(enabled=True)).report()
    assert [one.replica for one in read_traces(tmp_path)] == [None]
    assert read_traces(tmp_path, replica=1) == []


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = filled(0, 0).snapshot().write(tmp_path)
    content = json.loads(path.read_text())
    del content["replica"]
    path.write_text(json.dumps(content))
    (tmp_path / "stage0-rank0.1.json").write_text("{}")  # of a probe
    assert [snapshot.place for snapshot in read_snapshots(tmp_path)] == [(-1, 0, 0)]


def test_the_table_has_a_line_a_rank_and_says_where_the_time_went() -> None:
    table = render_table([filled(0, 0).snapshot(), filled(1, 0).snapshot()])
    head, rule, first, second = table.splitlines()
    assert [word for word in ("forward", "wait output", "back-pressure") if word not in head] == []
    assert len({len(line) for line in (head, rule, first, second)}) == 1
    assert "250.0 ms" in first
    assert "500.0 ms" in second
    assert "3.00" in second


def test_a_snapshot_does_not_change_any_more() -> None:
    telemetry = filled(0, 0)
    snapshot = telemetry.snapshot()
    telemetry.sending("proxy").messages += 1
    telemetry.sending("output")
    assert snapshot.sent["proxy"]["messages"] == 3
    assert "output" not in snapshot.sent


def test_a_snapshot_can_be_taken_while_another_thread_counts() -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # seconds: the threads take turns within one snapshot
    try:
        for _ in range(20):
            telemetry = Telemetry(0, 0)
            thread = threading.Thread(target=count_kinds, args=(telemetry, 200))
            thread.start()
            while thread.is_alive():
                telemetry.snapshot()
            assert len(telemetry.snapshot().sent) == 200
    finally:
        sys.setswitchinterval(interval)


def count_kinds(telemetry: Telemetry, number: int) -> None:
    for kind in range(number):
        telemetry.sending(f"kind {kind}").messages += 1


def test_the_last_report_is_made_once(tmp_path: Path) -> None:
    telemetry, trace = filled(1, 2), Trace(enabled=True)
    reporter = Reporter(
        Settings(telemetry_dir=tmp_path / "new", trace_dir=tmp_path / "new"),
        telemetry,
        trace,
        LinkClock({0: 1e-3}, offset_ns=77),
    )
    reporter.finish()
    (tmp_path / "new" / "stage1-rank2.json").unlink()
    reporter.finish()
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "stage1-rank2.trace.json"
    assert read_trace(path).offset_ns == 77
