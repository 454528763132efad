"""How much of what stage 0 may decide to handle is ready on the other stages, too.

A stage reports how many operations have finished, by queue; stage 0 subtracts what it has decided since.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence

Counts = tuple[int, ...]
"""By queue. A missing one is 0: the queues of a storage that was attached since."""


class ReadyCounts:
    """Owned by stage 0. A stage that has not reported has nothing ready."""

    def __init__(self, stages: int) -> None:
        self.applies = False  # to the synchronisation under way
        self._reports: dict[int, tuple[int, Counts]] = dict.fromkeys(range(1, stages), (0, ()))
        self._decisions: deque[tuple[int, Counts]] = deque()  # since the oldest report, but for zeros

    def report(self, stage: int, iteration: int, counts: Counts) -> None:
        """`counts` before the decision of that iteration was carried out."""
        self._reports[stage] = (iteration, counts)
        oldest = min(iteration for iteration, _ in self._reports.values())
        while self._decisions and self._decisions[0][0] < oldest:
            self._decisions.popleft()

    def decide(self, iteration: int, counts: Counts) -> None:
        if any(counts):
            self._decisions.append((iteration, counts))

    def limit(self, counts: Sequence[int]) -> list[int]:
        """`counts`, but no more than is ready on every stage."""
        ready = [self._ready(iteration, reported) for iteration, reported in self._reports.values()]
        return [min(count, *(_at(queue, each) for each in ready)) for queue, count in enumerate(counts)]

    def _ready(self, iteration: int, reported: Counts) -> Counts:
        decisions = (counts for when, counts in self._decisions if when >= iteration)
        return functools.reduce(left, decisions, reported)


def left(ready: Counts, handled: Counts) -> Counts:
    """What is left of `ready`."""
    return tuple(max(0, count - _at(queue, handled)) for queue, count in enumerate(ready))


def _at(queue: int, counts: Counts) -> int:
    return counts[queue] if queue < len(counts) else 0
