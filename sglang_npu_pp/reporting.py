"""When a rank tells what it counted: once at its end, and whenever it is asked (SIGUSR2)."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
from typing import Any

from .settings import Settings
from .telemetry import Telemetry, render_table
from .trace import RankTrace, Trace
from .transport.clock import UNMEASURED, LinkClock

logger = logging.getLogger("sglang_npu_pp")


class Reporter:
    """Writes telemetry and trace of one rank to where the settings say, and to the log."""

    def __init__(
        self, settings: Settings, telemetry: Telemetry, trace: Trace, clock: LinkClock = UNMEASURED
    ) -> None:
        self._settings, self._telemetry, self._trace, self._clock = settings, telemetry, trace, clock
        self._finished = False
        for directory in (settings.telemetry_dir, settings.trace_dir):
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)

    def report(self) -> None:
        snapshot = self._telemetry.snapshot()
        logger.info("sglang-npu-pp, time of this rank:\n%s", render_table([snapshot]))
        if self._settings.trace_dir is not None:
            trace = RankTrace.of(self._trace, snapshot.stage, snapshot.rank, self._clock.offset_ns)
            trace.write(self._settings.trace_dir)
        if self._settings.telemetry_dir is not None:
            snapshot.write(self._settings.telemetry_dir)

    def finish(self) -> None:
        """Report once, at the end."""
        if not self._finished:
            self._finished = True
            self.report()

    def install(self) -> None:
        """Report at exit, on SIGTERM (and then end as before), and on SIGUSR2 (and go on).

        Signals belong to the main thread and to whoever took them first: a handler that is already
        there stays.
        """
        atexit.register(self.finish)
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR2, lambda signum, frame: self.report())
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._end)

    def _end(self, signum: int, frame: Any) -> None:
        self.finish()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
