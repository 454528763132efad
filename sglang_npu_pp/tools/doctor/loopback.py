"""Self-test: two host lanes in this process, opened, measured and closed as in a server.

Two threads share an interpreter, so times are an upper bound; `make bench-host-lane` measures the real ones.
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
    """An exchange between threads, instead of SGLang's process group."""

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
        """Release the other side after a failure."""
        self._barrier.abort()


def check(settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    """A finding and the measurements of each transport."""
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
    """Over the transport of `settings`. Raises PipelineError."""
    settings = replace(settings, start_limit_s=LIMIT_S, wait_limit_s=LIMIT_S)
    rendezvous = _Rendezvous()
    with ThreadPoolExecutor(2) as threads:
        sides = [threads.submit(_side, stage, settings, rendezvous) for stage in (0, 1)]
    errors = [error for side in sides if (error := side.exception()) is not None]
    # The error of the side that failed first says more.
    errors.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
    if errors:
        raise errors[0]
    return sides[0].result()


def _side(stage: int, settings: Settings, rendezvous: _Rendezvous) -> LinkReport:
    lane = HostLane(RankContext.begin(stage, 2, settings), host=HOST)
    try:
        lane.open(rendezvous.exchange_of(stage))
        return measure(lane, LIMIT_S)
    except BaseException:
        rendezvous.leave()
        raise
    finally:
        lane.close()
