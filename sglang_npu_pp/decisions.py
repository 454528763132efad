"""What stage 0 decides for all stages, and tells them with the requests of an iteration.

A rank holds what it was told in `Told`. Two ranks that have had the same iterations have been told the same,
so whatever is decided from it alone they decide alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grammars:
    """Ids of requests whose grammar has been compiled, and of those that have waited for too long."""

    ready: frozenset[str] = frozenset()
    failed: frozenset[str] = frozenset()


NO_GRAMMARS = Grammars()


@dataclass(frozen=True)
class Decisions:
    """What is told in one iteration."""

    now: float
    """Seconds, `time.monotonic()` of the rank that decides."""
    overdue: frozenset[str] = frozenset()
    """Ids of requests that have waited or run for too long; from SGLang 0.5.20 on aborts say so."""
    grammars: Grammars = NO_GRAMMARS
    """From SGLang 0.5.16 on stage 0 sends them itself."""


class ToldClock:
    """Stands for the module `time` in functions whose decision all ranks must share."""

    def __init__(self, now: float) -> None:
        self._now = now

    def monotonic(self) -> float:
        return self._now

    perf_counter = monotonic


class Told:
    """The decisions that are in force on this rank."""

    def __init__(self) -> None:
        self.now = 0.0  # when it was last told: stands still in between
        self.this_iteration: Decisions | None = None

    @property
    def clock(self) -> ToldClock:
        return ToldClock(self.now)

    @property
    def overdue(self) -> frozenset[str]:
        return frozenset() if self.this_iteration is None else self.this_iteration.overdue

    @property
    def grammars(self) -> Grammars:
        return NO_GRAMMARS if self.this_iteration is None else self.this_iteration.grammars

    def take(self, requests: list[Any]) -> list[Any]:
        """Puts in force what is told among the requests of an iteration; returns the requests."""
        self.this_iteration = next((one for one in requests if isinstance(one, Decisions)), None)
        if self.this_iteration is None:
            return requests
        self.now = self.this_iteration.now
        return [one for one in requests if one is not self.this_iteration]

    def pass_on(self, requests: list[Any]) -> list[Any]:
        """The requests, and what this rank was told with them."""
        return requests if self.this_iteration is None else [*requests, self.this_iteration]
