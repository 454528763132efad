"""Reporting: files and log lines with telemetry and trace, at the end and on SIGUSR2. Never raises."""

from __future__ import annotations

import atexit
import logging
import signal
import threading
from contextlib import suppress
from pathlib import Path

from ..settings import Settings
from ..transport.clock import UNMEASURED, LinkClock
from .telemetry import Snapshot, Telemetry, render_table
from .termination import Termination
from .trace import RankTrace, Trace

logger = logging.getLogger("sglang_npu_pp")


class Reporter:
    """Reports one rank: to the directories of the settings, and to the log."""

    def __init__(
        self, settings: Settings, telemetry: Telemetry, trace: Trace, clock: LinkClock = UNMEASURED
    ) -> None:
        self._settings, self._telemetry, self._trace, self._clock = settings, telemetry, trace, clock
        self._finished = False

    def report(self) -> None:
        """Never raises: called by signal handlers and at the end."""
        with suppress(Exception):  # for example a closed log
            self._report()

    def _report(self) -> None:
        snapshot = self._telemetry.snapshot()
        with suppress(Exception):
            logger.info("sglang-npu-pp, time of this rank:\n%s", render_table([snapshot]))
        if self._settings.trace_dir is not None:
            trace = RankTrace.of(
                self._trace, snapshot.stage, snapshot.rank, self._clock.offset_ns, snapshot.replica
            )
            self._write(trace, self._settings.trace_dir, "SGLANG_NPU_PP_TRACE")
        # Last: it marks the report of this rank as complete.
        self._write(snapshot, self._settings.telemetry_dir, "SGLANG_NPU_PP_TELEMETRY_DIR")

    def _write(self, what: Snapshot | RankTrace, directory: Path | None, variable: str) -> None:
        if directory is None:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            what.write(directory)
        except Exception as error:
            logger.error(
                "sglang-npu-pp: stage %d rank %d cannot write to %s (%s: %s) and goes on; set %s to a "
                "directory that it can write.",
                what.stage,
                what.rank,
                directory,
                type(error).__name__,
                error,
                variable,
            )

    def finish(self) -> None:
        """Report once, at the end."""
        if not self._finished:
            self._finished = True
            self.report()

    def install(self) -> None:
        """Report at exit, on SIGUSR2 (and go on), and on SIGTERM if there are files to write.

        Handlers need the main thread; an existing handler stays.
        """
        atexit.register(self.finish)
        if threading.current_thread() is not threading.main_thread():
            return
        if signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL:
            signal.signal(signal.SIGUSR2, lambda signum, frame: self.report())
        if self._settings.telemetry_dir is not None or self._settings.trace_dir is not None:
            with suppress(Exception):  # the default action ends it then, without a report
                Termination(self.finish).install()
