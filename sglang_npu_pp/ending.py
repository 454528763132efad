"""The end of a server that has lost a part: every process of this node, at once.

SGLang's own end waits five seconds before it looks whose stacks it could dump, and kills multiprocessing's
resource tracker, which would have removed the shared memory of the processes that are killed behind it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

LAUNCHER = "_SGLANG_NPU_PP_LAUNCHER"
"""Environment variable: the process that may be ended so, and files that it leaves, for its schedulers."""

LAST_WORDS_S = 3.0
CORE_LIMIT_S = 300.0  # a core is as large as what the process had in memory
_POLL_S = 0.1


@dataclass(frozen=True)
class Node:
    """This node's part of a server: the process that started it, and what nobody else would remove."""

    launcher: psutil.Process
    files: tuple[Path, ...] = ()

    def tell_children(self) -> None:
        """Processes that are started from now on may end the node."""
        os.environ[LAUNCHER] = json.dumps([self.launcher.pid, *map(str, self.files)])

    @staticmethod
    def of_this_process() -> Node | None:
        """What an ancestor has told, None where it has told nothing."""
        pid, *files = json.loads(os.environ.get(LAUNCHER, "[0]"))
        ancestors = psutil.Process().parents()
        launcher = next((process for process in ancestors if process.pid == pid), None)
        return None if launcher is None else Node(launcher, tuple(map(Path, files)))


def speak(*words: Callable[[], None]) -> None:
    """Call each of `words`, which log or write something: no error and no delay of theirs keeps the end from
    coming. A log may be closed, its reader may be stopped, a file system may not answer.
    """

    def call() -> None:
        for word in words:
            with suppress(Exception):
                word()

    speaker = threading.Thread(target=call, name="last-words", daemon=True)
    with suppress(RuntimeError):  # no more threads
        speaker.start()
        speaker.join(LAST_WORDS_S)


def end_node(node: Node) -> NoReturn:
    """Kill the launcher and all that it started, this process last. Nothing keeps it from that.

    The resource tracker is spared: it removes the shared memory that they leave, and then ends by itself.
    A process whose core the kernel is writing is given the time for it.
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
    """SIGKILL would cut a core off. Those that dump none are killed now."""
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
        time.sleep(_POLL_S)


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
