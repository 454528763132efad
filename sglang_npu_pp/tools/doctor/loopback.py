"""Self-test: two host lanes in this process, opened, measured and closed as a server does it.

Two threads of one process share an interpreter, so the times are an upper bound: they say that the lane
works, `make bench-host-lane` says how fast it is.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from ...errors import PipelineError
from ...settings import Settings
from ...transport.context import RankContext
from ...transport.endpoints import Exchange
from ...transport.host_lane import HostLane
from .findings import Finding, Level
from .link_test import LinkReport, measure

LIMIT_S = 20.0
TRANSPORTS = {"ipc": "ipc", "tcp": "TCP + CURVE"}
HOST = "127.0.0.1"


class _Rendezvous:
    """In the place of SGLang's process group: an exchange between threads."""

    def __init__(self) -> None:
        self._records = [b"", b""]
        self._barrier = threading.Barrier(2)

    def exchange_of(self, stage: int) -> Exchange:
        def exchange(data: bytes) -> list[bytes]:
            self._records[stage] = data
            self._barrier.wait(LIMIT_S)
            everyone = list(self._records)
            self._barrier.wait(LIMIT_S)
            return everyone

        return exchange

    def leave(self) -> None:
        """Whoever failed lets the other one go."""
        self._barrier.abort()


def check(settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    """A finding for each transport, and the measurements by transport."""
    findings: list[Finding] = []
    data: dict[str, Any] = {}
    for transport, name in TRANSPORTS.items():
        if settings.host_transport not in ("auto", transport):
            continue
        try:
            report = run(replace(settings, host_transport=transport))
        except (PipelineError, threading.BrokenBarrierError) as error:
            findings.append(Finding(Level.WRONG, name, str(error) or "the two ends did not meet"))
        else:
            data[transport] = asdict(report)
            findings.append(Finding(Level.OK, name, str(report)))
    return findings, data


def run(settings: Settings) -> LinkReport:
    """Over the transport that `settings` name. Raises PipelineError."""
    settings = replace(settings, start_limit_s=LIMIT_S, wait_limit_s=LIMIT_S)
    meeting = _Rendezvous()
    with ThreadPoolExecutor(2) as threads:
        sides = [threads.submit(_side, stage, settings, meeting) for stage in (0, 1)]
    errors = [error for side in sides if (error := side.exception()) is not None]
    # One that only noticed that the other side had failed says less.
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return sides[0].result()


def _side(stage: int, settings: Settings, meeting: _Rendezvous) -> LinkReport:
    lane = HostLane(RankContext.begin(stage, 2, settings), host=HOST)
    try:
        lane.open(meeting.exchange_of(stage))
        return measure(lane, LIMIT_S)
    except BaseException:
        meeting.leave()
        raise
    finally:
        lane.close()
