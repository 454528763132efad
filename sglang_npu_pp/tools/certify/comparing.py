"""Numbers of the two servers side by side: median and spread over rounds, and the ratio of each round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .results import Resources, Side, Speed

_Measured = TypeVar("_Measured", Speed, Resources)

SPEED_MEASURES: Mapping[str, Callable[[Speed], float]] = {
    "requests/s": lambda speed: speed.requests_per_s,
    "output tokens/s": lambda speed: speed.output_tokens_per_s,
    "all tokens/s": lambda speed: speed.total_tokens_per_s,
    "TTFT ms, median": lambda speed: speed.ttft_ms.median,
    "TTFT ms, p99": lambda speed: speed.ttft_ms.p99,
    "TPOT ms, median": lambda speed: speed.tpot_ms.median,
    "TPOT ms, p99": lambda speed: speed.tpot_ms.p99,
    "ITL ms, median": lambda speed: speed.itl_ms.median,
    "ITL ms, p99": lambda speed: speed.itl_ms.p99,
}
"""Name with unit -> of one measurement."""

RESOURCE_MEASURES: Mapping[str, Callable[[Resources], float]] = {
    "CPU of the idle server, cores": lambda resources: resources.idle_cpu,
    "memory (PSS), MB": lambda resources: resources.memory_mb,
}


@dataclass(frozen=True)
class Spread:
    """Of values of several rounds."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def __str__(self) -> str:
        """Median (least to most); "" without values."""
        if not self.values:
            return ""
        if len(self.values) == 1:
            return number(self.values[0])
        return f"{number(self.median)} ({number(min(self.values))} to {number(max(self.values))})"


@dataclass(frozen=True)
class Compared:
    """One measure: round -> value, of each server."""

    name: str
    values: Mapping[Side, Mapping[int, float]]

    def spread(self, side: Side) -> Spread:
        return Spread(tuple(self.values[side].values()))

    @property
    def rounds(self) -> list[int]:
        return sorted({turn for values in self.values.values() for turn in values})

    @property
    def ratios(self) -> Mapping[int, float]:
        """Round -> patched / unpatched, where both were measured."""
        unpatched, patched = self.values[Side.UNPATCHED], self.values[Side.PATCHED]
        return {turn: patched[turn] / unpatched[turn] for turn in self.rounds if _divisible(self, turn)}


def _divisible(compared: Compared, turn: int) -> bool:
    return all(turn in values for values in compared.values.values()) and bool(
        compared.values[Side.UNPATCHED][turn]
    )


def compare_speeds(speeds: Sequence[Speed]) -> Mapping[str, list[Compared]]:
    """Load -> its measures, in the order in which they were measured."""
    loads = dict.fromkeys(speed.load for speed in speeds)
    return {
        load: [
            _compared(name, measure, [speed for speed in speeds if speed.load == load])
            for name, measure in SPEED_MEASURES.items()
        ]
        for load in loads
    }


def compare_resources(resources: Sequence[Resources]) -> list[Compared]:
    return [_compared(name, measure, resources) for name, measure in RESOURCE_MEASURES.items()]


def _compared(name: str, measure: Callable[[_Measured], float], found: Sequence[_Measured]) -> Compared:
    values: dict[Side, dict[int, float]] = {side: {} for side in Side}
    for one in found:
        values[one.side][one.round] = measure(one)
    return Compared(name, values)


def number(value: float) -> str:
    """Three significant digits, more of a large number; never as 1e+03."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.001 or not value else f"{value:.5f}"
