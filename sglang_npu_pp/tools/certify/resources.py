"""What a server costs: CPU while it has nothing to do, memory, and waits for communication."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from ...observe.trace import read_traces
from ..timeline.states import EXPOSED, Timeline, analyse
from .results import Resources, Side

WINDOW_S = 5.0


def measure(
    processes: Sequence[psutil.Process],
    side: Side,
    turn: int,
    timeline: Timeline | None = None,
    window_s: float = WINDOW_S,
) -> Resources:
    """Of an idle server with these processes; takes `window_s`. `timeline`: of its traces, if it has any."""
    return Resources(
        side=side,
        round=turn,
        idle_cpu=idle_cpu(processes, window_s),
        memory_mb=memory_mb(processes),
        exposed={} if timeline is None else exposed(timeline),
    )


def idle_cpu(
    processes: Iterable[psutil.Process],
    window_s: float = WINDOW_S,
    pause: Callable[[float], None] = time.sleep,
) -> float:
    """Cores that the processes use together, on average over `window_s`; one that ends does not count."""
    before = _cpu_seconds(processes)
    begin = time.monotonic()
    pause(window_s)  # the window is what is measured
    after = _cpu_seconds(before)
    elapsed = time.monotonic() - begin
    return sum(after[process] - before[process] for process in after) / elapsed


def _cpu_seconds(processes: Iterable[psutil.Process]) -> Mapping[psutil.Process, float]:
    found = {}
    for process in processes:
        with suppress(psutil.Error):
            times = process.cpu_times()
            found[process] = times.user + times.system
    return found


def memory_mb(processes: Iterable[psutil.Process]) -> float:
    """Proportional set size of all processes, in 10^6 bytes; of a process that hides it the next best."""
    return sum(map(_bytes, processes)) / 1e6


def _bytes(process: psutil.Process) -> int:
    """PSS, else USS, else RSS, which counts shared memory in every process; 0 for one that has ended."""
    with suppress(psutil.Error, OSError):
        found = process.memory_full_info()
        return int(getattr(found, "pss", 0) or getattr(found, "uss", 0) or found.rss)
    with suppress(psutil.Error, OSError):
        return int(process.memory_info().rss)
    return 0


def read_timeline(traces: Path, replica: int = 0) -> Timeline:
    """From the traces of a patched server. Raises ValueError where some are missing or damaged."""
    return analyse(read_traces(traces, replica=replica))


def exposed(timeline: Timeline) -> dict[int, float]:
    """Stage -> share of the busy time in which it waited for communication."""
    return {stage.stage: stage.share(EXPOSED) for stage in timeline.stages}
