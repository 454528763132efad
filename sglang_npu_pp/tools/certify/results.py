"""What certify finds, as plain values: the report is made of these alone."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


class Side(enum.StrEnum):
    """Which of the two servers."""

    UNPATCHED = "unpatched"
    PATCHED = "patched"


class Verdict(enum.StrEnum):
    PASSED = "passed"
    FAILED = "failed"
    LEFT_OUT = "left out"  # could not be compared, or was not asked for; the text says why


@dataclass(frozen=True)
class Check:
    """One question with its answer."""

    name: str
    verdict: Verdict
    text: str  # one sentence
    details: Sequence[str] = ()  # a line each: what differed


@dataclass(frozen=True)
class Difference:
    """A function that is not as in the nearest known release."""

    target: str
    release: str
    diff: str  # unified, or why there is none


@dataclass(frozen=True)
class Latency:
    """Milliseconds."""

    mean: float
    median: float
    p99: float


@dataclass(frozen=True)
class Speed:
    """What SGLang's load generator measured on one server; `round` counts the turns from 1."""

    side: Side
    round: int
    completed: int  # requests
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: Latency
    tpot_ms: Latency
    itl_ms: Latency
    load: str = ""  # in words; speeds of one load are compared


@dataclass(frozen=True)
class Resources:
    """Of one server, all its processes together."""

    side: Side
    round: int
    idle_cpu: float  # cores, while no request is there
    memory_mb: float  # proportional set size, in 10^6 bytes
    exposed: Mapping[int, float]  # stage -> share of the time in which communication was waited for; patched


@dataclass(frozen=True)
class Report:
    """All that the report says. Nothing in it names a machine, a path or a key."""

    build: str  # what this SGLang calls itself
    digest: str  # of its functions, as far as they matter
    decision: str  # what is in force, in words
    versions: Mapping[str, str]
    arguments: Sequence[str]  # of launch_server, redacted
    checks: Sequence[Check]
    doctor: Sequence[Check]
    differences: Sequence[Difference]
    speeds: Sequence[Speed]
    resources: Sequence[Resources]
    picture: str  # file name beside the report, or why there is none
    certified: bool
    conclusion: str  # one sentence
    seconds: float
    device: str = ""  # that the servers ran on, in words; says so where it is simulated
    variants: Mapping[str, Sequence[Speed]] = field(default_factory=dict)  # of --ab, by name

    @property
    def passed(self) -> bool:
        return all(check.verdict is not Verdict.FAILED for check in self.checks)
