"""A launcher looks after the processes that it started.

Peers notice a scheduler that was stopped, and end; but they are on other nodes, and cannot end this one.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess

import psutil

from .ending import is_resource_tracker
from .errors import PeerLostError

POLL_S = 0.2


class Watch:
    """Tells when a process was stopped for `limit_s`, or was killed.

    `started` are children of this process. `pids` are all that may be stopped; they may be more, and become
    more. `name` says in words what a process is, if it still can.
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
        self._names: dict[int, str] = {}  # of what has been seen running
        self._looks = math.ceil(limit_s / POLL_S) + 1
        self._stopped: Counter[int] = Counter()  # looks, not seconds: those pass while we are stopped too
        self._killed: set[BaseProcess] = set()
        children = psutil.Process().children()
        self._tracker = next((child for child in children if is_resource_tracker(child)), None)

    def start(self, on_lost: Callable[[int, PeerLostError], None]) -> None:
        """Look from a thread until a process is lost; `on_lost` is called there with its id and the error."""
        threading.Thread(target=self._run, args=(on_lost,), name="sglang-npu-pp-watch", daemon=True).start()

    def _run(self, on_lost: Callable[[int, PeerLostError], None]) -> None:
        lost = None
        while lost is None:
            time.sleep(POLL_S)
            lost = self.look()
        on_lost(*lost)

    def look(self) -> tuple[int, PeerLostError] | None:
        """The process that is lost, if one is. To be called every POLL_S."""
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
        """By somebody else. Who ends a whole server, as SGLang does, kills the resource tracker along.

        Only from the second look on, so that there was time for that.
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
