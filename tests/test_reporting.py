"""When a rank reports: at its end, and when it is asked to; as a process, because it is about signals."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sglang_npu_pp.telemetry import read_snapshots
from sglang_npu_pp.trace import read_trace

PROGRAM = """
import signal, sys
from pathlib import Path
from sglang_npu_pp.reporting import Reporter
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.telemetry import Telemetry
from sglang_npu_pp.trace import Trace

{before}
telemetry, trace = Telemetry(1, 3), Trace(enabled=True)
folder = Path(sys.argv[1])
Reporter(Settings(telemetry_dir=folder, trace_dir=folder), telemetry, trace).install()
print("installed", flush=True)
for line in sys.stdin:
    telemetry.sending("proxy").messages += 1
    trace.record("push", "proxy")
    print("counted", flush=True)
"""


@contextmanager
def rank(folder: Path, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that counts a message for every line it reads, and says so."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            expect(process, "installed")
            yield process
        finally:
            process.kill()


def expect(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == line + "\n"


def count(process: subprocess.Popen[str], messages: int) -> None:
    assert process.stdin is not None
    for _ in range(messages):
        process.stdin.write("\n")
        process.stdin.flush()
        expect(process, "counted")


def reported(folder: Path) -> tuple[int, int]:
    """Messages in the counters and events in the trace that were written."""
    (snapshot,) = read_snapshots(folder)
    assert (snapshot.stage, snapshot.rank) == (1, 3)
    return snapshot.sent["proxy"]["messages"], len(read_trace(folder / "stage1-rank3.trace.json").events)


def test_it_reports_when_asked_and_goes_on_and_at_exit(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        count(process, 2)
        process.send_signal(signal.SIGUSR2)
        count(process, 1)  # a signal is handled before the next line is
        assert reported(tmp_path) == (2, 2)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=20) == 0
        assert reported(tmp_path) == (3, 3)


def test_it_reports_when_it_is_ended_and_ends_by_that_signal(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        count(process, 4)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
        assert reported(tmp_path) == (4, 4)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_handler_that_is_already_there_stays(tmp_path: Path, name: str) -> None:
    theirs = f"signal.signal(signal.{name}, lambda *_: print('theirs', flush=True))"
    with rank(tmp_path, before=theirs) as process:
        process.send_signal(signal.Signals[name])
        expect(process, "theirs")
        count(process, 1)
        assert not list(tmp_path.iterdir())
