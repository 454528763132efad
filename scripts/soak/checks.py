"""What a soak looks at in every idle gap, and when that is wrong. Checks work on samples, not on a server."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from sglang_npu_pp.observe.telemetry import Snapshot

# A pipeline of this size launches some 20 to 50 microbatches a second, and moves several messages for each:
# 1 KiB that is kept for every microbatch is 1.2 to 3 MiB a minute. What an allocator that does not give back
# adds to a process that leaks nothing is a part of that, and ends.
GROWTH_LIMIT_MIB = 1.0  # a minute
SPARE_DESCRIPTORS = 4  # a log or a file of counters that is open at the moment of a sample

_ERROR = re.compile(r"Traceback|\b[A-Z]\w*Error\b|\bERROR\b|\bCRITICAL\b|memory leak|Segmentation fault")


@dataclass(frozen=True)
class Sample:
    """One scheduler in an idle gap."""

    at_s: float  # since the load began
    stage: int
    rss_mib: float
    descriptors: int
    threads: int

    @classmethod
    def of(cls, pid: int, stage: int, at_s: float) -> Sample:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return cls(
            at_s=at_s,
            stage=stage,
            rss_mib=int(status["VmRSS"].split()[0]) / 1024,
            descriptors=sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
            threads=int(status["Threads"]),
        )


@dataclass(frozen=True)
class Trend:
    """Samples of one scheduler, from behind the warm-up on."""

    stage: int
    first_mib: float
    last_mib: float
    most_mib: float
    growth_mib: float  # a minute
    first_descriptors: int
    most_descriptors: int
    first_threads: int
    most_threads: int

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Trend:
        """`samples` of one stage, at least two of them."""
        first, last = samples[0], samples[-1]
        return cls(
            stage=first.stage,
            first_mib=first.rss_mib,
            last_mib=last.rss_mib,
            most_mib=max(sample.rss_mib for sample in samples),
            growth_mib=60 * _slope([(sample.at_s, sample.rss_mib) for sample in samples]),
            first_descriptors=first.descriptors,
            most_descriptors=max(sample.descriptors for sample in samples),
            first_threads=first.threads,
            most_threads=max(sample.threads for sample in samples),
        )

    def complaints(self) -> list[str]:
        found = []
        if self.growth_mib > GROWTH_LIMIT_MIB:
            found.append(
                f"the memory of stage {self.stage} grows by {self.growth_mib:.2f} MiB a minute, "
                f"{GROWTH_LIMIT_MIB:g} are allowed"
            )
        if self.most_descriptors > self.first_descriptors + SPARE_DESCRIPTORS:
            found.append(
                f"stage {self.stage} had {self.first_descriptors} open descriptors and then "
                f"{self.most_descriptors}"
            )
        if self.most_threads > self.first_threads + SPARE_DESCRIPTORS:
            found.append(f"stage {self.stage} had {self.first_threads} threads and then {self.most_threads}")
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def trends(samples: Iterable[Sample], warm_up_s: float) -> list[Trend]:
    """One for each stage. ValueError when a stage has fewer than two samples behind the warm-up."""
    by_stage: dict[int, list[Sample]] = {}
    for sample in samples:
        if sample.at_s >= warm_up_s:
            by_stage.setdefault(sample.stage, []).append(sample)
    if not by_stage or min(map(len, by_stage.values())) < 2:
        raise ValueError("the soak was too short to see a trend")
    return [Trend.of(by_stage[stage]) for stage in sorted(by_stage)]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The median of the slopes between all pairs of points: a step or a few outliers do not turn it."""
    return statistics.median((y2 - y1) / (x2 - x1) for (x1, y1), (x2, y2) in combinations(points, 2))


def in_flight(snapshots: Sequence[Snapshot]) -> dict[str, tuple[int, int]]:
    """By kind, what is not as it must be at rest: messages on their way, and those that arrived and were not
    taken. Empty when every message that was sent was received and taken, so that all windows are empty.

    A stage that waits for its next message has asked for one more than have arrived.
    """
    under_way: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    for snapshot in snapshots:
        for kind, counters in snapshot.sent.items():
            under_way[kind] += counters["messages"]
        for kind, counters in snapshot.received.items():
            under_way[kind] -= counters["messages"]
            waiting[kind] += max(0, counters["messages"] - counters["waits"])
    found = {kind: (under_way[kind], waiting[kind]) for kind in sorted(under_way)}
    return {kind: difference for kind, difference in found.items() if any(difference)}


def errors_in(log: str) -> list[str]:
    """Lines that look like an error; a server that is well logs none."""
    return [line for line in log.splitlines() if _ERROR.search(line)]
