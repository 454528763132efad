"""When a rank reports: at its end, and when it is asked to; as a process, because it is about signals."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sglang_npu_pp.observe.telemetry import read_snapshots
from sglang_npu_pp.observe.trace import read_trace
from sglang_npu_pp.tools.certify.processes import is_alive

PROGRAM = """
import signal, sys
from pathlib import Path
from sglang_npu_pp.observe.reporting import Reporter
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.observe.telemetry import Telemetry
from sglang_npu_pp.observe.trace import Trace

{before}
telemetry, trace = Telemetry(1, 3), Trace(enabled=True)
folder = Path(sys.argv[1]) if sys.argv[1:] else None
Reporter(Settings(telemetry_dir=folder, trace_dir=folder), telemetry, trace).install()
print("installed", flush=True)
for line in sys.stdin:
    if line.strip():
        print("blocked", flush=True)
        exec(line)
    telemetry.sending("proxy").messages += 1
    trace.record("push", "proxy")
    print("counted", flush=True)
"""
LIMIT_S = 60.0
# C code that waits for a lock for ever, as a collective may, and that no signal wakes up.
_LOCKED_TWICE = (
    "import ctypes; m = ctypes.create_string_buffer(64); f = ctypes.{}(None).pthread_mutex_lock; f(m); f(m)"
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3 * LIMIT_S)]
HOLDS_THE_LOCK = _LOCKED_TWICE.format("PyDLL")  # of the interpreter: no Python runs
RELEASES_IT = _LOCKED_TWICE.format("CDLL")  # other threads run, this one does not


@contextmanager
def rank(folder: Path | None, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that counts a message for every line it reads, after doing what it says, and says so."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(before=before), *([str(folder)] if folder else [])],
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


# --- SIGTERM is obeyed whatever the process does -------------------------------------------------------


def block(process: subprocess.Popen[str], how: str) -> None:
    """Have the main thread go into C code, and wait until it is blocked there."""
    assert process.stdin is not None
    process.stdin.write(how + "\n")
    process.stdin.flush()
    expect(process, "blocked")
    call = Path(f"/proc/{process.pid}/task/{process.pid}/syscall")
    # futex(address, FUTEX_WAIT_PRIVATE, locked with somebody waiting): the interpreter's own waits differ
    wait_until(lambda: call.read_text().split()[2:4] == ["0x80", "0x2"], "the process is not blocked")


def wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{otherwise} after {LIMIT_S:g} s"
        time.sleep(0.01)


@pytest.mark.parametrize("how", [HOLDS_THE_LOCK, RELEASES_IT], ids=["lock held", "lock released"])
def test_with_nothing_to_write_the_default_action_ends_it(how: str) -> None:
    with rank(None) as process:
        block(process, how)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM


def test_it_reports_and_ends_while_its_main_thread_is_in_c_code(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        count(process, 2)
        block(process, RELEASES_IT)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM
        assert reported(tmp_path) == (2, 2)


def test_it_ends_without_a_report_where_no_python_can_run(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        block(process, HOLDS_THE_LOCK)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM
        assert not list(tmp_path.iterdir())


def test_a_second_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    """Its action is the default one as soon as the first has come."""
    with rank(tmp_path) as process:
        block(process, HOLDS_THE_LOCK)
        assert caught(process.pid)
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not caught(process.pid), "the kernel has not reset the action")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM


def caught(pid: int) -> bool:
    (line,) = (s for s in Path(f"/proc/{pid}/status").read_text().splitlines() if s.startswith("SigCgt:"))
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def test_what_ends_a_child_does_not_end_it(tmp_path: Path) -> None:
    """A child that was forked has the same handlers, and the same pipe behind them."""
    kill_a_child = (
        "import os, signal; pid = os.fork(); "
        "pid == 0 and signal.pause(); "
        "os.kill(pid, signal.SIGTERM); "
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM"
    )
    with rank(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write(kill_a_child + "\n")
        process.stdin.flush()
        expect(process, "blocked")
        expect(process, "counted")
        count(process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM
        assert reported(tmp_path) == (2, 2)


def test_a_handler_that_comes_later_is_the_one_that_is_called(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        assert process.stdin is not None
        process.stdin.write("signal.signal(signal.SIGTERM, lambda *_: print('theirs', flush=True))\n")
        process.stdin.flush()
        expect(process, "blocked")
        expect(process, "counted")
        process.send_signal(signal.SIGTERM)
        expect(process, "theirs")
        assert not list(tmp_path.iterdir())


def test_it_reports_without_the_process_beside_it(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        (beside,) = psutil.Process(process.pid).children()
        beside.kill()
        wait_until(lambda: not is_alive(beside), "the process beside it runs")
        process.send_signal(signal.SIGUSR2)
        count(process, 1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM
        assert reported(tmp_path) == (1, 1)


def test_nothing_is_left_of_one_that_was_killed(tmp_path: Path) -> None:
    with rank(tmp_path) as process:
        beside = psutil.Process(process.pid).children()
        assert len(beside) == 1
        process.kill()
        process.wait(LIMIT_S)
        _, alive = psutil.wait_procs(beside, LIMIT_S)
        assert not alive


# --- a report ends nothing -----------------------------------------------------------------------------


def gone(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()  # and in its place something that is no directory


def full(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "full", str(folder)], check=False).returncode:
        pytest.skip("only root can mount a disk that is full, and not everywhere")
    (folder / "all").write_bytes(bytes(4096))


def closed(folder: Path) -> None:
    """The log, which is no reason not to write the files."""


CANNOT_BE_WRITTEN = {"gone": gone, "full": full, "a log that is closed": closed}
CLOSED_LOG = (
    "import logging, sys; logging.basicConfig(level='INFO', stream=sys.stderr); "
    "os = __import__('os'); os.close(2); sys.stderr.close()"
)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    subprocess.run(["umount", "-q", str(tmp_path)], check=False)


@pytest.mark.parametrize("why", CANNOT_BE_WRITTEN)
def test_a_report_that_cannot_be_written_ends_nothing(folder: Path, why: str) -> None:
    log_is_closed = why == "a log that is closed"
    with rank(folder, before=CLOSED_LOG if log_is_closed else "") as process:
        count(process, 1)
        CANNOT_BE_WRITTEN[why](folder)
        for _ in range(2):
            process.send_signal(signal.SIGUSR2)
            count(process, 1)
        if log_is_closed:
            assert reported(folder) == (2, 2)
        if why == "full":
            assert [path.name for path in folder.iterdir()] == ["all"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM
