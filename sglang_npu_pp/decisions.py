"""Decisions of stage 0 for all stages, sent with the requests of an iteration.

Ranks in the same iteration hold the same `SharedDecisions`, so results of it alone are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grammars:
    """Ids of requests: grammar compiled, or wait limit exceeded."""

    ready: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()


NO_GRAMMARS = Grammars()


@dataclass(frozen=True)
class Decisions:
    """The decisions sent in one iteration."""

    now: float
    """Seconds, `time.monotonic()` of the rank that decides."""
    overdue: frozenset[str] = frozenset()
    """Ids of requests past a time limit; from SGLang 0.5.20 on upstream sends aborts."""
    grammars: Grammars = NO_GRAMMARS
    """From SGLang 0.5.16 on upstream sends them."""


class SharedClock:
    """Replaces the module `time` for results equal on all ranks."""

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now

    perf_counter = monotonic


class SharedDecisions:
    """Decisions in force on this rank."""

    def __init__(self) -> None:
        self.now = 0.0  # of the last decision: stands still in between
        self.this_iteration: Decisions | None = None

    @property
    def clock(self) -> SharedClock:
        return SharedClock(self.now)

    @property
    def overdue(self) -> frozenset[str]:
        return frozenset() if self.this_iteration is None else self.this_iteration.overdue

    @property
    def grammars(self) -> Grammars:
        return NO_GRAMMARS if self.this_iteration is None else self.this_iteration.grammars

    def take(self, requests: list[Any]) -> list[Any]:
        """Put the decisions among `requests` in force; return the rest."""
        self.this_iteration = next((one for one in requests if isinstance(one, Decisions)), None)
        if self.this_iteration is None:
            return requests
        self.now = self.this_iteration.now
        return [one for one in requests if one is not self.this_iteration]

    def pass_on(self, requests: list[Any]) -> list[Any]:
        """The requests and this iteration's decisions, for the next stage."""
        return requests if self.this_iteration is None else [*requests, self.this_iteration]
