"""What the benchmark of disaggregated servers counts as look-ups. Time is set by the test."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from scripts.lib.disaggregated import noted
from scripts.lib.kv_plugin import kv_probe


class Clock:
    """Stands for `time`: every look at the wall takes 10 of it, and the thread has run for 3 of those."""

    def __init__(self) -> None:
        self._wall = self._cpu = 0

    def monotonic(self) -> int:
        self._wall += 10
        return self._wall

    def thread_time(self) -> int:
        self._cpu += 3
        return self._cpu


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
