"""The end of a node after the loss of a process: detection by the launcher, then SIGKILL for all.

SGLang's own end waits five seconds for stack dumps, and leaves shared memory: it kills multiprocessing's
resource tracker.
"""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import psutil

from .errors import PeerLostError

LAUNCHER = "_SGLANG_NPU_PP_LAUNCHER"
"""Environment variable: the process that may be ended so, and files that it leaves, for its schedulers."""

BEST_EFFORT_S = 3.0
CORE_LIMIT_S = 300.0  # a core is as large as the memory of its process
_CORE_POLL_S = 0.1
POLL_S = 0.2  # of a launcher's watch


@dataclass(frozen=True)
class Node:
    """This node's part of a server: the launcher, and files that only we remove."""

    launcher: psutil.Process
    files: tuple[Path, ...] = ()

    def export_to_children(self) -> None:
        """Let processes started from now on end the node."""
        os.environ[LAUNCHER] = json.dumps([self.launcher.pid, *map(str, self.files)])

    @staticmethod
    def of_this_process() -> Node | None:
        """Set by an ancestor's `export_to_children`, else None."""
        pid, *files = json.loads(os.environ.get(LAUNCHER, "[0]"))
        ancestors = psutil.Process().parents()
        launcher = next((process for process in ancestors if process.pid == pid), None)
        return None if launcher is None else Node(launcher, tuple(map(Path, files)))


def best_effort(*steps: Callable[[], None]) -> None:
    """Call each of `steps` (logging, writing files). Neither an error nor a delay (closed log, stopped
    reader, hanging file system) keeps the end from coming."""

    def call() -> None:
        for step in steps:
            with suppress(Exception):
                step()

    thread = threading.Thread(target=call, name="best-effort", daemon=True)
    with suppress(RuntimeError):  # no more threads
        thread.start()
        thread.join(BEST_EFFORT_S)


def end_node(node: Node) -> NoReturn:
    """Kill the launcher and all its descendants, this process last; first wait for a core dump in progress.

    Spared: the resource tracker, which frees shared memory and then ends.
    """
    processes = _others(node)
    _let_cores_be_written(node, processes)
    for process in processes:
        _kill(process)
    for file in node.files:
        with suppress(OSError):
            file.unlink(missing_ok=True)
    _kill(node.launcher)  # its children may end with it, this process among them
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives SIGKILL")


def _others(node: Node) -> list[psutil.Process]:
    with suppress(psutil.Error):
        children = node.launcher.children(recursive=True)
        return [one for one in children if one.pid != os.getpid() and not is_resource_tracker(one)]
    return []


def _let_cores_be_written(node: Node, processes: Sequence[psutil.Process]) -> None:
    """SIGKILL would cut a core off; processes without one are killed now."""
    dumping = [process for process in processes if _dumps_core(process)]
    if not dumping:
        return
    if node.launcher.pid != os.getpid():
        with suppress(psutil.Error):
            node.launcher.suspend()  # or it would do SGLang's end meanwhile
    for process in processes:
        if process not in dumping:
            _kill(process)
    deadline = time.monotonic() + CORE_LIMIT_S
    while any(map(_dumps_core, dumping)) and time.monotonic() < deadline:
        time.sleep(_CORE_POLL_S)


def _dumps_core(process: psutil.Process) -> bool:
    with suppress(OSError):
        return "\nCoreDumping:\t1\n" in Path(f"/proc/{process.pid}/status").read_text()
    return False


def is_resource_tracker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    return False


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.Error):
        process.kill()


# --- check of its processes by a launcher -------------------------------------------------------------


class Watch:
    """A launcher's check of its processes, for a stop of `limit_s` seconds or a kill; peers on other nodes
    cannot end this one.

    `started`: children of this process. `pids`: all processes to check for a stop. `name`: words for a
    process.
    """

    def __init__(
        self,
        started: Sequence[BaseProcess],
        pids: Sequence[int],
        *,
        limit_s: float,
        name: Callable[[psutil.Process], str],
    ) -> None:
        self._started, self._pids, self._limit_s, self._name = started, pids, limit_s, name
        self._names: dict[int, str] = {}  # of processes seen running
        self._looks = math.ceil(limit_s / POLL_S) + 1
        self._stopped: Counter[int] = Counter()  # looks, not seconds: those pass while we are stopped too
        self._killed: set[BaseProcess] = set()
        children = psutil.Process().children()
        self._tracker = next((child for child in children if is_resource_tracker(child)), None)

    def start(self, on_lost: Callable[[int, PeerLostError], None]) -> None:
        """Check from a thread; `on_lost` is called there with the pid and the error."""
        threading.Thread(target=self._run, args=(on_lost,), name="sglang-npu-pp-watch", daemon=True).start()

    def _run(self, on_lost: Callable[[int, PeerLostError], None]) -> None:
        lost = None
        while lost is None:
            time.sleep(POLL_S)
            lost = self.look()
        on_lost(*lost)

    def look(self) -> tuple[int, PeerLostError] | None:
        """The lost process, if any. Called every POLL_S."""
        for pid in tuple(self._pids):
            if self._has_been_stopped(pid):
                name = self._names.get(pid, "a process of this node")
                return pid, PeerLostError(
                    f"{name}: process {pid} has been stopped (SIGSTOP) for {self._limit_s:g} s, "
                    "so its peers have given it up and this node ends; find out what stopped it, then "
                    "restart the server."
                )
        for process in self._started:
            if process.pid in self._names and self._was_killed(process):
                return process.pid, PeerLostError(
                    f"{self._names[process.pid]}: process {process.pid} was killed "
                    "(SIGKILL), so this node ends; see whether the kernel ran out of memory, then restart "
                    "the server."
                )
        return None

    def _has_been_stopped(self, pid: int) -> bool:
        state = ""
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            state = process.status()
            self._names[pid] = self._name(process) or self._names.get(pid, "a process of this node")
        self._stopped[pid] = self._stopped[pid] + 1 if state == psutil.STATUS_STOPPED else 0
        return self._stopped[pid] >= self._looks

    def _was_killed(self, process: BaseProcess) -> bool:
        """By a third party: SGLang's end of a whole server kills the resource tracker too.

        True from the second check on, which leaves time for that.
        """
        if process.exitcode != -signal.SIGKILL or self._tracker is None:
            return False
        if process not in self._killed:
            self._killed.add(process)
            return False
        return _runs(self._tracker)


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
