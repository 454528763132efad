"""Metrics: the telemetry of a rank in Prometheus' format, on the engine's /metrics.

In prometheus_client's multiprocess mode every process maps a file of values, and the /metrics handler adds
the files up. A thread copies the values from `Telemetry` once a second: counting in prometheus_client would
cost a lock and a write for each of ten counters of an iteration, and copying every n iterations would hide
the last counts of an idle or blocked scheduler.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .telemetry import ChannelCounters, Telemetry

logger = logging.getLogger("sglang_npu_pp")

PREFIX = "sglang_npu_pp_"
COPY_EVERY_S = 1.0  # a fraction of Prometheus' shortest usual scrape interval, 5 s
RANK_LABELS = ("stage", "rank")


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric family. `name`: as on /metrics; `labels`: besides `RANK_LABELS`."""

    name: str
    meaning: str
    labels: tuple[str, ...] = ()


MESSAGES = Metric(f"{PREFIX}messages_total", "messages sent and received", ("kind", "direction"))
BYTES = Metric(
    f"{PREFIX}message_bytes_total",
    "their bytes, headers and what took the device lane included",
    ("kind", "direction"),
)
WAITS = Metric(f"{PREFIX}receive_waits_total", "how often the scheduler asked for a message", ("kind",))
WAIT_SECONDS = Metric(
    f"{PREFIX}receive_wait_seconds_total", "how long it was blocked until the message was there", ("kind",)
)
BACKPRESSURE = Metric(
    f"{PREFIX}backpressure_total", "how often a send found its window or its slots full", ("kind",)
)
BACKPRESSURE_SECONDS = Metric(
    f"{PREFIX}backpressure_seconds_total", "how long it was blocked for that", ("kind",)
)
PHASE_SECONDS = Metric(
    f"{PREFIX}phase_seconds_total",
    "time of the scheduler in a phase; forward: on CPU the forward, on a device its launch",
    ("phase",),
)
REFUSED = Metric(
    f"{PREFIX}refused_total", "frames from unauthenticated clients and messages that could not be read"
)
REFUSED_CONNECTIONS = Metric(
    f"{PREFIX}refused_connections_total", "connections from the network without a key of this server"
)
PREPARED = Metric(
    f"{PREFIX}prepared_decodes_total",
    "decodes of stage 0 that were prepared while their tokens were on their way: used, or taken_back",
    ("end",),
)
COUNTERS = (
    MESSAGES,
    BYTES,
    WAITS,
    WAIT_SECONDS,
    BACKPRESSURE,
    BACKPRESSURE_SECONDS,
    PHASE_SECONDS,
    REFUSED,
    REFUSED_CONNECTIONS,
    PREPARED,
)

SLOTS = Metric(f"{PREFIX}microbatch_slots", "microbatches that may be in flight")
WINDOW_MESSAGES = Metric(f"{PREFIX}window_messages", "messages of one kind that may be in flight to one peer")
WINDOW_BYTES = Metric(f"{PREFIX}window_bytes", "bytes of one kind that may be in flight to one peer")
DEVICE_SLOTS = Metric(f"{PREFIX}device_slots", "send slots of the device lane, and as many receive slots")
LIMITS = (SLOTS, WINDOW_MESSAGES, WINDOW_BYTES, DEVICE_SLOTS)

FEATURE = Metric(
    f"{PREFIX}feature", "1 where a feature is in force, 0 where its functions are not known", ("feature",)
)

Series = tuple[Metric, tuple[str, ...]]


def read_counters(telemetry: Telemetry) -> Iterator[tuple[Series, float]]:
    """All counters of the rank: metric, label values, total since the start."""
    yield (REFUSED, ()), telemetry.refused
    yield (REFUSED_CONNECTIONS, ()), telemetry.refused_connections
    yield (PREPARED, ("used",)), telemetry.prepared
    yield (PREPARED, ("taken_back",)), telemetry.taken_back
    for phase, seconds in list(telemetry.phases_s.items()):
        yield (PHASE_SECONDS, (phase,)), seconds
    for kind, counters in list(telemetry.sent.items()):
        yield from _traffic(kind, "sent", counters)
        yield (BACKPRESSURE, (kind,)), counters.backpressure
        yield (BACKPRESSURE_SECONDS, (kind,)), counters.backpressure_s
    for kind, counters in list(telemetry.received.items()):
        yield from _traffic(kind, "received", counters)
        yield (WAITS, (kind,)), counters.waits
        yield (WAIT_SECONDS, (kind,)), counters.wait_s


def _traffic(kind: str, direction: str, counters: ChannelCounters) -> Iterator[tuple[Series, float]]:
    yield (MESSAGES, (kind, direction)), counters.messages
    yield (BYTES, (kind, direction)), counters.bytes


class Exporter:
    """Copies the telemetry of one rank to prometheus_client."""

    def __init__(
        self,
        telemetry: Telemetry,
        limits: Mapping[Metric, float],
        *,
        features: Mapping[str, bool] | None = None,
        labels: Mapping[str, str] | None = None,
        registry: Any = None,
    ) -> None:
        """`limits`: constant values of the metrics in `LIMITS`. `features`: which are in force. `labels`:
        further labels, where stage and rank are not unique. `registry`: None for prometheus_client's own."""
        # Imported late: where its values live is decided by the environment at the first import, and the
        # engine process has not set it yet when it loads plugins.
        import prometheus_client

        self._telemetry = telemetry
        self._own = {"stage": str(telemetry.stage), "rank": str(telemetry.rank), **(labels or {})}
        names = tuple(self._own)
        registry = registry or prometheus_client.REGISTRY
        self._families = {
            metric: prometheus_client.Counter(
                metric.name, metric.meaning, (*names, *metric.labels), registry=registry
            )
            for metric in COUNTERS
        }
        self._series: dict[Series, Any] = {}
        self._copied: dict[Series, float] = {}
        self._end = threading.Event()
        fixed: dict[Series, float] = {(metric, ()): value for metric, value in limits.items()}
        fixed |= {(FEATURE, (name,)): float(known) for name, known in (features or {}).items()}
        gauges = {
            metric: prometheus_client.Gauge(
                metric.name,
                metric.meaning,
                (*names, *metric.labels),
                registry=registry,
                multiprocess_mode="mostrecent",
            )
            for metric in dict.fromkeys(metric for metric, _ in fixed)
        }
        for (metric, values), value in fixed.items():
            gauges[metric].labels(*self._own.values(), *values).set(value)

    def copy(self) -> None:
        """Update every series: 0.3 us each, 1 us more if it has grown."""
        for series, total in read_counters(self._telemetry):
            grown = total - self._copied.get(series, 0.0)
            if series not in self._series:
                metric, values = series
                self._series[series] = self._families[metric].labels(*self._own.values(), *values)
            if grown > 0:
                self._series[series].inc(grown)
                self._copied[series] = total

    def start(self) -> None:
        """Copy now, then every second in a daemon thread."""
        self.copy()
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._end.set()

    def _run(self) -> None:
        try:
            while not self._end.wait(COPY_EVERY_S):
                self.copy()
        except Exception:  # for example a full disk; the server goes on without these metrics
            logger.exception("sglang-npu-pp: metrics of this rank are not updated any more")
