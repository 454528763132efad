"""When a node may be ended in our way, and how its processes are named.

That it ends is shown in tests/server/test_lost_peers.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from sglang_npu_pp import ending as ending_of_nodes
from sglang_npu_pp.ending import LAUNCHER, Node
from sglang_npu_pp.errors import PeerLostError
from sglang_npu_pp.patches import ending
from sglang_npu_pp.patches.ending import DUMPS, launch_scheduler_processes, let_dumps_be_made, name_of


@pytest.fixture(autouse=True)
def environment_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher sets these for its schedulers, and remembers what its end is."""
    monkeypatch.setattr(ending, "_node", None)
    for name in (LAUNCHER, DUMPS):
        monkeypatch.setenv(name, "")  # noted, so that it is put back
        monkeypatch.delenv(name)


def server_args(**changed: Any) -> SimpleNamespace:
    """Those that matter here, with SGLang's defaults, of a server with two stages."""
    ours = {"pp_size": 2, "speculative_algorithm": None}
    return SimpleNamespace(**{**ours, "crash_dump_folder": None, "custom_sigquit_handler": None, **changed})


def launch(arguments: SimpleNamespace) -> str | None:
    """What the schedulers of such a server find in their environment. They are not started, as with Ray."""
    found = []

    def original(cls: Any, arguments: Any, ports: Any) -> tuple[None, None]:
        found.append(os.environ.get(LAUNCHER))
        return None, None

    launch_scheduler_processes(original, None, arguments, SimpleNamespace(instance_id="ipc:///tmp/x"))
    return found[0]


def test_schedulers_may_end_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    pid, file = json.loads(launch(server_args()) or "")
    assert pid == os.getpid()
    assert file.startswith("/dev/shm/sglang_loads_x_")


@pytest.mark.parametrize(
    "changed",
    [
        {"pp_size": 1},
        {"speculative_algorithm": "DFLASH"},
        {"crash_dump_folder": "/tmp/dumps"},
        {"custom_sigquit_handler": print},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_they_may_not_where_sglang_has_more_to_do(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER, "[1]")  # another server of this process
    assert launch(server_args(**changed)) is None


@pytest.mark.parametrize(("value", "own"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_a_dump_that_was_asked_for_is_made(value: str, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER, raising=False)
    monkeypatch.setenv("SGLANG_PYSPY_DUMP_BEFORE_CRASH", value)
    assert (launch(server_args()) is None) == own


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("sglang::scheduler_PP1", "stage 1 rank 0"),
        ("sglang::scheduler_DP1_PP3_TP2_EP2", "stage 3 rank 2"),
        ("sglang::detokenizer", "sglang::detokenizer"),
    ],
)
def test_a_process_is_named_by_its_title(title: str, name: str) -> None:
    with Titled(title) as process:
        assert name_of(process.process) == name


# --- dumps that SGLang makes by default ----------------------------------------------------------------


class Titled:
    """A process with a title, which it changes when it is told."""

    PROGRAM = "import setproctitle\nwhile True:\n setproctitle.setproctitle(input()); print(flush=True)"

    def __init__(self, title: str) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self.process = psutil.Process(self._popen.pid)
        self.rename(title)

    def rename(self, title: str) -> None:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._popen.stdin.write(title + "\n")
        self._popen.stdout.readline()

    def become(self, state: str) -> None:
        """`state`: alive, killed, reaped, stopped or crashed."""
        if state in ("killed", "reaped"):
            self.process.kill()
            os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        if state == "reaped":
            self._popen.wait()
        if state == "stopped":
            self.process.suspend()
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)
        if state == "crashed":
            self.rename("sglang::scheduler_PP0 crashed")

    def __enter__(self) -> Titled:
        return self

    def __exit__(self, *_: object) -> None:
        self._popen.kill()
        self._popen.communicate()


@pytest.fixture
def schedulers() -> Iterator[list[Titled]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Titled(f"sglang::scheduler_PP{stage}")) for stage in range(3)]


def looks(schedulers: list[Titled], monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None]) -> int:
    """How often it looked again; `then` is called instead of a sleep, with the number of the look."""
    done = 0

    def sleep(seconds: float) -> None:
        nonlocal done
        done += 1
        then(done)

    monkeypatch.setattr(ending, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    let_dumps_be_made([each.process for each in schedulers])
    return done


def never(look: int) -> None:
    raise AssertionError("it waits")


@pytest.mark.parametrize("crash", ["killed", "reaped", "crashed"])
def test_the_end_waits_for_dumps_until_no_scheduler_is_left_to_be_dumped(
    schedulers: list[Titled], crash: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DUMPS, "60")
    schedulers[0].become(crash)
    ends = {3: schedulers[1], 5: schedulers[2]}
    assert (
        looks(schedulers, monkeypatch, lambda look: ends[look].become(crash) if look in ends else None) == 5
    )


@pytest.mark.parametrize("states", [(), ("stopped",), ("stopped",) * 3])
def test_a_peer_that_is_silent_is_no_crash_and_nothing_is_waited_for(
    schedulers: list[Titled], states: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DUMPS, "60")
    for scheduler, state in zip(schedulers, states, strict=False):
        scheduler.become(state)
    assert looks(schedulers, monkeypatch, never) == 0


@pytest.mark.parametrize("state", ["stopped", "crashed", "killed"])
def test_after_a_crash_nothing_is_waited_for_if_no_other_is_alive(
    schedulers: list[Titled], state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DUMPS, "60")
    schedulers[0].become("crashed")
    for scheduler in schedulers[1:]:
        scheduler.become(state)
    assert looks(schedulers, monkeypatch, never) == 0


def test_where_sglang_dumps_nothing_nothing_is_waited_for(
    schedulers: list[Titled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DUMPS, raising=False)
    schedulers[0].become("killed")
    assert looks(schedulers, monkeypatch, never) == 0


def test_dumps_that_take_for_ever_do_not_keep_the_end_from_coming(
    schedulers: list[Titled], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DUMPS, "60")
    schedulers[0].become("killed")
    clock = iter(range(0, 1000, 50))
    slept: list[float] = []
    fake = SimpleNamespace(sleep=slept.append, monotonic=lambda: next(clock))
    monkeypatch.setattr(ending, "time", fake)
    let_dumps_be_made([each.process for each in schedulers])
    assert len(slept) == 2  # at 50 and 100 s; 60 + 3 * 30 s have passed at 150


def dumps(changed: dict[str, Any], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What schedulers of such a server are told of dumps."""
    for name in (LAUNCHER, DUMPS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch(server_args(**changed))
    return os.environ.get(DUMPS)


@pytest.fixture
def with_py_spy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "py-spy").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))


PYSPY, CORES = "SGLANG_PYSPY_DUMP_BEFORE_CRASH", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH"
CUDA, CUDA_WAIT = "CUDA_ENABLE_USER_TRIGGERED_COREDUMP", "SGLANG_CUDA_COREDUMP_BEFORE_CRASH_WAIT_SECS"


@pytest.mark.parametrize(
    ("changed", "variables", "told"),
    [
        ({}, {}, "60"),
        ({}, {CORES: "0"}, "60"),
        ({}, {PYSPY: "0"}, None),
        ({}, {PYSPY: "false", CUDA: "1"}, "120"),
        ({}, {CUDA: "1", CUDA_WAIT: "7"}, "67"),
        ({}, {CUDA: "1", CORES: "n"}, "60"),
        ({"node_rank": 1}, {}, None),
        ({"dp_size": 2}, {}, None),
        ({"tokenizer_worker_num": 2}, {}, None),
        ({"crash_dump_folder": "/tmp/dumps"}, {}, None),
        ({"pp_size": 1}, {}, None),
        ({}, {"SGLANG_RUST_SERVER": "1"}, None),
    ],
)
def test_schedulers_are_told_whether_they_may_be_dumped(
    changed: dict[str, Any],
    variables: dict[str, str],
    told: str | None,
    with_py_spy: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert dumps(changed, variables, monkeypatch) == told


def test_without_py_spy_there_is_nothing_to_wait_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert dumps({}, {}, monkeypatch) is None


def kill_process_tree(pid: int) -> None:
    raise AssertionError("it kills multiprocessing's resource tracker")


def sigquit_handler(done: list[str], fails: bool = False) -> None:
    """Upstream's, in short."""
    done.append(f"dumped, waited {os.environ.get(CUDA_WAIT, '60')} s for cores")
    if fails:
        raise OSError("no space left on device")
    kill_process_tree(os.getpid())


@pytest.mark.parametrize(
    ("variables", "fails", "waited"),
    [({}, False, "0"), ({}, True, "0"), ({CUDA: "1"}, False, "60"), ({CUDA_WAIT: "5"}, False, "5")],
)
def test_a_launcher_ends_its_node_when_the_dumps_are_made(
    variables: dict[str, str], fails: bool, waited: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def end(node: Any) -> None:
        done.append(f"ended {node}")
        raise SystemExit

    monkeypatch.delenv(CUDA_WAIT, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ending, "_node", "this node")
    monkeypatch.setattr(ending, "end_node", end)
    with pytest.raises(SystemExit):
        ending.running_phase_sigquit_handler(sigquit_handler, done, fails)
    monkeypatch.delenv(CUDA_WAIT, raising=False)
    assert done[:2] == [f"dumped, waited {waited} s for cores", "ended this node"]


def test_a_launcher_of_others_ends_as_upstream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "_node", None)
    with pytest.raises(AssertionError, match="resource tracker"):
        ending.running_phase_sigquit_handler(sigquit_handler, [])


# --- a scheduler that has lost a peer ------------------------------------------------------------------


def raising() -> None:
    raise OSError("no space left on device")


def waiting() -> None:
    threading.Event().wait()


@pytest.mark.parametrize("finish", [raising, waiting], ids=["raises", "does not return"])
def test_no_report_keeps_a_lost_peer_from_ending_the_node(
    finish: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log may be closed too."""
    ended: list[object] = []
    monkeypatch.setattr(ending_of_nodes, "BEST_EFFORT_S", 0.1)
    monkeypatch.setattr(Node, "of_this_process", staticmethod(lambda: "node"))
    monkeypatch.setattr(
        ending, "current_or_none", lambda: SimpleNamespace(reporter=SimpleNamespace(finish=finish))
    )
    monkeypatch.setattr(ending, "logger", SimpleNamespace(error=lambda *_: raising()))
    monkeypatch.setattr(ending, "end_node", ended.append)

    def loop(scheduler: Any) -> None:
        raise PeerLostError("stage 1 rank 0: stage 0 is gone")

    ending.dispatch_event_loop(loop, None)
    assert ended == ["node"]
