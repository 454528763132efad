"""SIGTERM of a process with a report to write.

With nothing to write, SIGTERM keeps its default action. A Python handler waits for the main thread to leave C
code, and for the GIL. So three parts may end the process:

1. the handler, where the main thread runs Python;
2. a thread, where the main thread is in C code without the GIL;
3. a helper process, if the report has not begun within BEGIN_S or ended within REPORT_S: it repeats SIGTERM,
   whose default action the kernel has restored.

CPython's C handler wakes all by a byte on the wakeup fd.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

TURN_S = 0.2  # until the thread takes the place of a handler that does not run
BEGIN_S = 1.0  # until the report has begun: Python does not run at all
REPORT_S = 8.0  # for the report; container runtimes send SIGKILL after ten seconds
_BEGUN = b"\0"  # no signal has this number

_BESIDE = """
import os, select, signal, sys, time
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)  # they may be sent to the whole group
parent, begin_s, report_s = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
def is_ending():
    # The kernel has reset the action: it was not a child of the parent, with the same pipe, that got it.
    with open(f"/proc/{parent}/status") as status:
        caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt:"))
    return not caught >> (signal.SIGTERM - 1) & 1
received = None
while received is None and os.getppid() == parent:
    if select.select([0], [], [], 5.0)[0]:
        byte = os.read(0, 1)
        if not byte or (byte[0] == signal.SIGTERM and is_ending()):
            received = byte
if received:
    os.write(1, received)
    end = time.monotonic() + begin_s
    while os.getppid() == parent and time.monotonic() < end:
        if select.select([0], [], [], 0.02)[0] and os.read(0, 1) == bytes(1):
            end = time.monotonic() + report_s
    if os.getppid() == parent:
        os.kill(parent, signal.SIGTERM)
"""


class Termination:
    """On SIGTERM calls `report`, which must not raise, then ends the process."""

    def __init__(self, report: Callable[[], None]) -> None:
        self._report = report
        self._begun, self._reported = threading.Event(), threading.Event()
        self._writer, self._pid = -1, os.getpid()  # to the process beside this one

    def install(self) -> bool:
        """For the main thread. False, with nothing changed, if SIGTERM cannot be handled or is not ours."""
        reset_by_kernel = getattr(ctypes.CDLL(None), "sysv_signal", None)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or reset_by_kernel is None:
            return False
        taken = signal.set_wakeup_fd(-1)
        if taken != -1:  # an event loop, which needs its own signals
            signal.set_wakeup_fd(taken)
            return False
        reader, writer = os.pipe()
        try:
            beside = self._start_beside(reader)
        except OSError:
            os.close(writer)
            return False
        finally:
            os.close(reader)
        self._writer = writer
        os.set_blocking(writer, False)
        os.register_at_fork(after_in_child=self._forget)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, self._on_signal)
        _reset_when_it_comes(reset_by_kernel)
        threading.Thread(target=self._run, args=(beside,), name="sigterm", daemon=True).start()
        return True

    def _start_beside(self, reader: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _BESIDE, str(os.getpid()), str(BEGIN_S), str(REPORT_S)],
            stdin=reader,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        if os.getpid() == self._pid:
            self._end()
        os.kill(os.getpid(), signal.SIGTERM)  # a child, before it could forget

    def _run(self, beside: subprocess.Popen[bytes]) -> None:
        assert beside.stdout is not None
        came = beside.stdout.read(1)
        ours = signal.getsignal(signal.SIGTERM) == self._on_signal  # or one that came later and took over
        if came and ours and not self._begun.wait(TURN_S):
            self._end()

    def _end(self) -> None:
        if self._begun.is_set():
            self._reported.wait(REPORT_S)
        else:
            self._begun.set()
            with suppress(OSError):  # it is gone, and it is late for that
                os.write(self._writer, _BEGUN)
            self._report()
            self._reported.set()
        os.kill(os.getpid(), signal.SIGTERM)

    def _forget(self) -> None:
        """After fork, in the child: the helper belongs to the parent."""
        if signal.getsignal(signal.SIGTERM) != self._on_signal:
            return  # something else has set its own
        with suppress(ValueError):
            signal.set_wakeup_fd(-1)
            has_come = _set_action(signal.SIGTERM, None) is None
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if has_come:  # between the fork and here
                os.kill(os.getpid(), signal.SIGTERM)


def _reset_when_it_comes(install: Any) -> None:
    """Let the kernel restore SIGTERM's default action before CPython's handler runs.

    `install`: sysv_signal(3), which differs from signal(3) in this alone.
    """
    install.argtypes = [ctypes.c_int, ctypes.c_void_p]
    install(signal.SIGTERM, _set_action(signal.SIGTERM, None))


def _set_action(number: int, action: int | None) -> int | None:
    """signal(2): `action` is a function's address, None for the default. Returns the previous one."""
    function = ctypes.CDLL(None).signal
    function.restype, function.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before: int | None = function(number, action)
    return before
