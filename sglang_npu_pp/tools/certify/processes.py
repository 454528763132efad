"""The processes of a server: found, ended, and what they leave in shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

POLL_S = 0.1

# Prefixes of the shared memory that SGLang and multiprocessing leave in /dev/shm.
SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_PREFIXES = ("sgl_", "sglang_", "sem.", "psm_", "torch_")


class ProcessTree:
    """Launchers, each in a session of its own, and all processes that they started."""

    def __init__(self) -> None:
        self.launchers: list[subprocess.Popen[bytes]] = []
        self.shared_memory: set[Path] = set()
        """Segments used by processes that `alive` has seen."""
        self._seen: dict[int, psutil.Process] = {}

    def launch(
        self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
    ) -> None:
        """See `start`."""
        self.launchers.append(start(command, environment=environment, folder=folder, log=log))

    def alive(self) -> list[psutil.Process]:
        """Every living process; notes them and the shared memory they use.

        Sessions catch orphans, the family tree catches processes that left their session.
        """
        launchers = [launcher.pid for launcher in self.launchers]
        for pid in psutil.pids():
            with suppress(psutil.Error, OSError):
                if pid not in self._seen and os.getsid(pid) in launchers:
                    self._seen[pid] = psutil.Process(pid)
        for launcher in launchers:
            with suppress(psutil.Error):
                for child in psutil.Process(launcher).children(recursive=True):
                    self._seen.setdefault(child.pid, child)
        alive = [process for process in self._seen.values() if is_alive(process)]
        self.shared_memory |= mapped_shared_memory(alive)
        return alive

    def end(self, limit_s: float) -> list[int]:
        """End every process and remove their shared memory; returns the ids of survivors of SIGKILL.

        The launchers are asked first (SIGINT: SGLang is gone in two seconds; SIGTERM makes it drain and write
        crash diagnostics for twenty). What is left after `limit_s` is killed.
        """
        processes = self.alive()
        for launcher in self.launchers:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGINT)
        left = wait_gone(processes, limit_s)
        for process in {*left, *self.alive()}:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        left = wait_gone(self._seen.values(), limit_s)
        for launcher in self.launchers:
            launcher.poll()
        self.launchers.clear()
        self._seen.clear()
        for segment in self.shared_memory:
            segment.unlink(missing_ok=True)
        self.shared_memory.clear()
        return [process.pid for process in left]


def start(
    command: Sequence[str], *, environment: Mapping[str, str], folder: Path, log: Path
) -> subprocess.Popen[bytes]:
    """Start `command` in `folder`, in a session of its own; both of its outputs go to the new file `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs: not gone, not another process with its id, not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_gone(processes: Iterable[psutil.Process], limit_s: float) -> list[psutil.Process]:
    """Wait until none of `processes` is alive, at most `limit_s`; return those that still are."""
    deadline = time.monotonic() + limit_s
    left = [process for process in processes if is_alive(process)]
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = [process for process in left if is_alive(process)]
    return left


def schedulers(processes: Iterable[psutil.Process]) -> dict[int, str]:
    """SGLang's schedulers among them: process id -> title, in the order of titles (stage, then rank)."""
    titles = {}
    for process in processes:
        with suppress(psutil.Error):
            title = " ".join(process.cmdline())
            if title.startswith("sglang::scheduler"):
                titles[process.pid] = title
    return {pid: titles[pid] for pid in sorted(titles, key=titles.__getitem__)}


def mapped_shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Segments in /dev/shm that these processes use and that SGLang does not always remove."""
    inodes = set()
    for process in processes:
        with suppress(OSError):
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if f"{SHARED_MEMORY}/" in line:
                    inodes.add(int(line.split()[4]))
    # By inode: glibc renames a semaphore after it was mapped, so the path in maps is not its name.
    found = set()
    for path in SHARED_MEMORY.iterdir():
        if path.name.startswith(SHARED_MEMORY_PREFIXES):
            with suppress(FileNotFoundError):  # another server's, which has removed it meanwhile
                if path.lstat().st_ino in inodes:
                    found.add(path)
    return found


def handles_signal(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for the signal (Linux: SigCgt in /proc)."""
    with suppress(OSError):  # it has ended
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False
