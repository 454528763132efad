"""Telemetry and traces of a running server, asked for by SIGUSR2."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ...observe.trace import SUFFIX
from .processes import POLL_S, handles_signal

TELEMETRY_DIR_VARIABLE = "SGLANG_NPU_PP_TELEMETRY_DIR"
TRACE_VARIABLE = "SGLANG_NPU_PP_TRACE"


class ReportError(RuntimeError):
    """The schedulers cannot report, or did not within the limit."""


def write_reports(
    folder: Path, schedulers: Collection[int], limit_s: float, check: Callable[[], None]
) -> list[Path]:
    """Have every scheduler write its files into `folder` now; return them, all complete.

    `check` is called while they are waited for, and may raise. Raises ReportError.
    """
    before = _modification_times(folder)
    for pid in schedulers:
        if not handles_signal(pid, signal.SIGUSR2):  # whose default action would end the process
            raise ReportError(f"scheduler {pid} does not write telemetry: is the plugin active?")
        os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + limit_s
    while True:
        now = _modification_times(folder)
        written = sorted(path for path, mtime in now.items() if before.get(path) != mtime)
        counters = [path for path in written if not path.name.endswith(SUFFIX)]  # come last
        if len(counters) >= len(schedulers) and all(_is_complete_json(path) for path in written):
            return written
        check()
        if time.monotonic() > deadline:
            raise ReportError(
                f"{len(counters)} of {len(schedulers)} telemetry files were written to {folder} in "
                f"{limit_s:.0f} s"
            )
        time.sleep(POLL_S)


def _modification_times(folder: Path) -> dict[Path, int]:
    """Nanoseconds since the epoch for every JSON file in `folder`."""
    times = {}
    for path in folder.glob("*.json"):
        with suppress(FileNotFoundError):
            times[path] = path.stat().st_mtime_ns
    return times


def _is_complete_json(path: Path) -> bool:
    """Whether the whole file has been written."""
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True
