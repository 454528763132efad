"""The end of a server that has lost a part: every process of this node, at once.

SGLang's own end waits five seconds before it looks whose stacks it could dump, and kills multiprocessing's
resource tracker, which would have removed the shared memory of the processes that are killed behind it.
"""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import psutil

LAUNCHER = "_SGLANG_NPU_PP_LAUNCHER"
"""Environment variable: the process that may be ended so, and files that it leaves, for its schedulers."""


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


def end_node(node: Node) -> NoReturn:
    """Kill the launcher and all that it started, this process last.

    The resource tracker is spared: it removes the shared memory that they leave, and then ends by itself.
    """
    for process in node.launcher.children(recursive=True):
        if process.pid != os.getpid() and not is_resource_tracker(process):
            _kill(process)
    for file in node.files:
        file.unlink(missing_ok=True)
    _kill(node.launcher)  # its children may end with it, this process among them
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nobody survives SIGKILL")


def is_resource_tracker(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    return False


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()
