"""CPU, memory and exposed communication of processes and traces that are known."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sglang_npu_pp.observe.trace import Event, RankTrace
from sglang_npu_pp.tools.certify import resources
from sglang_npu_pp.tools.certify.results import Resources, Side

BUSY = "print('ready', flush=True)\nwhile True: pass"
IDLE = "print('ready', flush=True)\ninput()"
MS = 1_000_000


@pytest.fixture
def start() -> Iterator[Any]:
    """Starts a Python program that prints one line when it is ready; ended afterwards."""
    started: list[subprocess.Popen[str]] = []

    def begin(program: str) -> psutil.Process:
        command = [sys.executable, "-S", "-c", program]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        return psutil.Process(process.pid)

    yield begin
    for process in started:
        process.kill()
        process.communicate(timeout=30)


def test_a_process_that_waits_uses_nothing_and_one_that_computes_does(start: Any) -> None:
    assert resources.idle_cpu([start(IDLE)], window_s=0.3) < 0.05
    assert 0.05 < resources.idle_cpu([start(BUSY)], window_s=0.5) < 1.2


def test_a_process_that_ends_meanwhile_does_not_count(start: Any) -> None:
    waits, computes = start(IDLE), start(BUSY)

    def kill(window_s: float) -> None:
        computes.kill()
        computes.wait(30)

    assert resources.idle_cpu([waits, computes], 0.1, pause=kill) < 0.05
    assert resources.memory_mb([computes]) == 0


def test_memory_is_that_of_all(start: Any) -> None:
    large = start(f"block = b'x' * 50_000_000\n{IDLE}")
    small = start(IDLE)
    assert 50 < resources.memory_mb([large]) < 90
    assert resources.memory_mb([large, small]) > resources.memory_mb([large])


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        (SimpleNamespace(pss=3e6, uss=2e6, rss=9e6), 3.0),
        (SimpleNamespace(uss=2e6, rss=9e6), 2.0),
        (None, 9.0),  # not allowed
    ],
)
def test_what_a_process_hides_is_replaced_by_the_next_best(full: Any, expected: float) -> None:
    def memory_full_info() -> Any:
        if full is None:
            raise psutil.AccessDenied(1)
        return full

    process: Any = SimpleNamespace(
        memory_full_info=memory_full_info, memory_info=lambda: SimpleNamespace(rss=9e6)
    )
    assert resources.memory_mb([process]) == expected


def write_traces(folder: Path, stages: int = 2) -> None:
    """Stage 0 computes all along, stage 1 half of the time; then it waits for tensors that were pushed."""
    events = {
        0: [(0, "launch", ""), (5, "push", "proxy"), (20, "launched", "")],
        1: [(0, "launch", ""), (10, "launched", ""), (10, "wait", "proxy"), (20, "ready", "proxy")],
    }
    for stage in range(stages):
        found = [Event(time * MS + 1, name, kind, 0, 1) for time, name, kind in events[stage]]
        RankTrace(stage, 0, 0, 20 * MS, found).write(folder)


def test_exposed_communication_comes_from_the_traces(tmp_path: Path) -> None:
    write_traces(tmp_path)
    found = resources.exposed(resources.read_timeline(tmp_path))
    assert found == {0: 0.0, 1: pytest.approx(0.5)}


def test_missing_traces_are_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="traces of all stages are needed"):
        resources.read_timeline(tmp_path)


def test_all_of_it_together(start: Any, tmp_path: Path) -> None:
    write_traces(tmp_path)
    timeline = resources.read_timeline(tmp_path)
    found = resources.measure([start(IDLE)], Side.PATCHED, 2, timeline, window_s=0.1)
    assert (found.side, found.round) == (Side.PATCHED, 2)
    assert set(found.exposed) == {0, 1}
    unpatched = resources.measure([start(IDLE)], Side.UNPATCHED, 1, window_s=0.1)
    assert isinstance(unpatched, Resources)
    assert unpatched.exposed == {}
