"""The end of a node, and the watch that may call for it: real processes, killed and stopped."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sglang_npu_pp import ending
from sglang_npu_pp.ending import POLL_S

from .small_node import LIMIT_S

LIMIT_OF_A_TEST_S = 60.0
LOOKS = math.ceil(LIMIT_S / POLL_S) + 1  # until a stopped process is lost

pytestmark = pytest.mark.timeout(4 * LIMIT_OF_A_TEST_S)


class Node:
    """A launcher of tests/small_node.py with its children."""

    def __init__(self, file: Path) -> None:
        """`file` is made by the launcher, and removed with the node."""
        self._launcher = subprocess.Popen(
            [sys.executable, "-m", "tests.small_node", str(file)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        said = json.loads(self.hear())
        self.pids: list[int] = said["pids"]
        self.files = [file, *(Path("/dev/shm") / name for name in said["segments"])]
        (self.tracker,) = [psutil.Process(pid) for pid in said["trackers"]]
        self.processes = [psutil.Process(pid) for pid in (self._launcher.pid, *self.pids)]

    def tell(self, line: str) -> None:
        assert self._launcher.stdin is not None
        self._launcher.stdin.write(line + "\n")

    def hear(self) -> str:
        assert self._launcher.stdout is not None
        return self._launcher.stdout.readline().strip()

    def look(self) -> str:
        self.tell("look")
        return self.hear()

    def send(self, number: signal.Signals, state: str) -> None:
        """Send the first child a signal and wait until it is in `state`."""
        process = psutil.Process(self.pids[0])
        process.send_signal(number)
        deadline = time.monotonic() + LIMIT_OF_A_TEST_S
        with suppress(psutil.NoSuchProcess):
            while process.status() != state:
                assert time.monotonic() < deadline, f"the child is {process.status()}, not {state}"
                time.sleep(0.01)

    def remove(self) -> None:
        for process in (*self.processes, self.tracker):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._launcher.communicate()
        for file in self.files:
            file.unlink(missing_ok=True)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "file")
    yield node
    node.remove()


def assert_nothing_is_left(node: Node) -> None:
    _, alive = psutil.wait_procs([*node.processes, node.tracker], timeout=LIMIT_OF_A_TEST_S)
    assert not alive
    assert not [file for file in node.files if file.exists()]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["end", "end unheard"])
def test_a_child_ends_the_node_and_leaves_no_shared_memory(node: Node, order: str) -> None:
    """Also where it cannot say why: what is said and written before never keeps the end from coming."""
    assert all(file.exists() for file in node.files)
    node.tell(order)
    assert_nothing_is_left(node)


def test_a_file_that_cannot_be_removed_keeps_nothing_from_ending(node: Node) -> None:
    node.files[0].unlink()
    node.files[0].mkdir()
    node.tell("end")
    _, alive = psutil.wait_procs(node.processes, timeout=LIMIT_OF_A_TEST_S)
    assert not alive
    node.files[0].rmdir()


def test_a_core_is_written_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are killed meanwhile, and the launcher, which would do the same to it, is stopped."""
    sleepers = [subprocess.Popen(["sleep", "3600"]) for _ in range(3)]
    launcher, dumping, other = processes = [psutil.Process(one.pid) for one in sleepers]
    seen = []

    def dumps_core(process: psutil.Process) -> bool:
        if process == dumping:
            seen.append([one.status() == psutil.STATUS_STOPPED for one in processes])
        return process == dumping and len(seen) < 3

    monkeypatch.setattr(ending, "_dumps_core", dumps_core)
    try:
        ending._let_cores_be_written(ending.Node(launcher), [dumping, other])
        other.wait(LIMIT_OF_A_TEST_S)
        assert len(seen) == 3
        assert seen[0] == [False] * 3
        assert launcher.status() == psutil.STATUS_STOPPED
        assert dumping.status() != psutil.STATUS_STOPPED
    finally:
        for one in sleepers:
            one.kill()
            one.wait()


def test_a_child_that_is_stopped_is_lost_after_the_limit(node: Node) -> None:
    node.send(signal.SIGSTOP, psutil.STATUS_STOPPED)
    said = [node.look() for _ in range(LOOKS)]
    assert said[:-1] == ["nothing"] * (LOOKS - 1)
    assert said[-1].startswith(
        f"child {node.pids[0]}: process {node.pids[0]} has been stopped (SIGSTOP) for 1 s"
    )


def test_a_pause_that_is_shorter_than_the_limit_is_forgotten(node: Node) -> None:
    for _ in range(2):
        node.send(signal.SIGSTOP, psutil.STATUS_STOPPED)
        assert {node.look() for _ in range(LOOKS - 1)} == {"nothing"}
        node.send(signal.SIGCONT, psutil.STATUS_SLEEPING)
        assert node.look() == "nothing"


def test_a_child_that_was_killed_is_lost(node: Node) -> None:
    node.look()
    node.send(signal.SIGKILL, psutil.STATUS_ZOMBIE)
    assert node.look() == "nothing"  # it might be that the whole node is being ended
    assert node.look().startswith(f"child {node.pids[0]}: process {node.pids[0]} was killed (SIGKILL)")


def test_a_child_that_ended_in_another_way_is_not(node: Node) -> None:
    node.send(signal.SIGTERM, psutil.STATUS_ZOMBIE)
    assert {node.look() for _ in range(3)} == {"nothing"}


def test_nobody_is_lost_when_sglang_ends_the_server(node: Node) -> None:
    node.tell("end as SGLang does")
    assert node.hear() == "done"
    assert {node.look() for _ in range(3)} == {"nothing"}


@pytest.mark.slow
def test_the_watch_ends_a_node_with_a_sentence(node: Node) -> None:
    node.tell("watch")
    node.send(signal.SIGSTOP, psutil.STATUS_STOPPED)
    assert "restart the server" in node.hear()
    assert_nothing_is_left(node)


def test_only_an_ancestor_may_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ending.LAUNCHER, raising=False)
    assert ending.Node.of_this_process() is None
    for pid, expected in ((os.getpid(), False), (os.getppid(), True)):
        node = ending.Node(psutil.Process(pid), (Path("/dev/shm/one"),))
        monkeypatch.setenv(ending.LAUNCHER, "")
        node.export_to_children()
        assert ending.Node.of_this_process() == (node if expected else None)
