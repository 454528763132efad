"""What the benchmarks of DP metadata and of look-ups count. Time is set by the tests."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from rig.disaggregated import noted
from rig.probes import FOLDER, dp_metadata_probe, kv_probe
from scripts.bench import dp_metadata


class Clock:
    """Stands for `time`: every look at the wall takes 10 of it, and the thread has run for 3 of those."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0

    def monotonic_ns(self) -> int:
        self._wall += 10
        return self._wall

    def thread_time_ns(self) -> int:
        self._cpu += 3
        return self._cpu

    monotonic, thread_time = monotonic_ns, thread_time_ns


def batch(idle: bool) -> Any:
    return SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: idle))


def test_a_step_counts_calls_once_and_for_what_it_launched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # as a server has it, in which the probe's own imports are bare names
    monkeypatch.setattr(dp_metadata_probe, "time", Clock())
    monkeypatch.setattr(
        "sglang.srt.runtime_context.get_parallel", lambda: SimpleNamespace(pp_rank=1, tp_rank=0)
    )
    meter = dp_metadata_probe.Meter(tmp_path)
    wait = meter.timed(lambda: None)
    gather = meter.timed(wait)  # upstream's name, in which ours waits
    prepare = meter.beginning(gather)
    for launched in (batch(idle=False), batch(idle=True), None):
        prepare()
        if launched is not None:
            meter.launch(launched)
            wait()  # what was left at the gather is decided in the launch
    prepare()
    meter.write()
    written = json.loads((tmp_path / "stage1-rank0.1.json").read_text())
    nested, alone = [20, 6], [10, 3]
    both = [one + other for one, other in zip(nested, alone, strict=True)]
    assert written == {"batch": [both], "idle": [both], "nothing": [nested]}


def test_the_table_has_all_rounds_of_a_competitor() -> None:
    def row(name: str, number: int, ns: int) -> dict[str, Any]:
        steps = {"stage0-rank0": {"batch": [[ns, ns // 2]] * 2}, "stage1-rank1": {"idle": [[ns, 0]] * 3}}
        return {"competitor": name, "round": number, "steps": steps, "tokens": [[1]], "load": 0.0}

    rows = [row("upstream", 0, 4000), row("upstream", 1, 8000), row("ours", 0, 1000), row("ours", 1, 1000)]
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(dp_metadata.table(rows))
    lines = [line for line in console.export_text().splitlines() if "stage" in line]
    cells = [" ".join(line.replace("│", " ").split()) for line in lines]
    assert cells[0] == "stage0 batch (4) 6 8 3 (4) 1 1 0"
    assert cells[4].startswith("stage1 idle (6) 6 8 0")
    assert dp_metadata.tokens_are_equal(rows)
    rows[3]["tokens"] = [[2]]
    assert not dp_metadata.tokens_are_equal(rows)


def test_lookups_of_an_iteration_are_counted_once_and_only_of_its_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_probe, "time", Clock())
    monkeypatch.setattr(kv_probe, "LOOKUPS", ())
    times = kv_probe.LookupTimes(kv_probe.Notes(tmp_path / "1.jsonl"))
    ask = times._timed(lambda: None)
    resolve = times._timed(ask)
    for _ in range(2):
        times.begin_iteration()
        resolve()
        ask()
        other = threading.Thread(target=resolve)
        other.start()
        other.join()
    times.begin_iteration()
    times.begin_iteration()  # nothing was asked
    assert noted(tmp_path, "lookups") == [{"lookups": 30_000.0, "cpu_ms": 9_000.0}] * 2
