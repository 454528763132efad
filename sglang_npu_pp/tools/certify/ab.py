"""`certify --ab`: the server with all switches on against each one off, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import median

from ...settings import Settings
from .results import Speed

ALL_ON = "all on"
SWITCHES = ("pin_memory", "early_send", "early_receive", "ahead")  # fields of Settings

COLUMNS = ("switch", "output tokens/s", "requests/s", "TTFT", "TPOT", "ITL")
_VALUES: Sequence[Callable[[Speed], float]] = (
    lambda speed: speed.output_tokens_per_s,
    lambda speed: speed.requests_per_s,
    lambda speed: speed.ttft_ms.median,
    lambda speed: speed.tpot_ms.median,
    lambda speed: speed.itl_ms.median,
)


@dataclass(frozen=True)
class Variant:
    """A server of the comparison; `environment` for all its ranks."""

    name: str
    environment: Mapping[str, str]


def variants() -> Sequence[Variant]:
    """All switches on, then each one off. All are set, whatever the user's environment has."""
    about = {each.name: each.metadata for each in fields(Settings)}
    on = {about[switch]["variable"]: about[switch]["default"] for switch in SWITCHES}
    off = [Variant(f"{variable}=0", {**on, variable: "0"}) for variable in on]
    return [Variant(ALL_ON, on), *off]


def turns(rounds: int) -> Iterable[tuple[int, Variant]]:
    """(round from 1, variant) in the order to measure in: every other round backwards, against drift."""
    for number in range(1, rounds + 1):
        yield from ((number, each) for each in (variants() if number % 2 else variants()[::-1]))


def rows(speeds: Mapping[str, Sequence[Speed]]) -> list[tuple[str, ...]]:
    """Rows below `COLUMNS`, one for each variant with a switch off; `speeds` by variant.

    A cell: off / on within a round, median and range over the rounds, "1.03 (0.98-1.05)"; "-" without one.
    """
    on = {speed.round: speed for speed in speeds[ALL_ON]}
    return [
        (name, *(_cell(_ratios(value, on, of_variant)) for value in _VALUES))
        for name, of_variant in speeds.items()
        if name != ALL_ON
    ]


def _ratios(value: Callable[[Speed], float], on: Mapping[int, Speed], speeds: Sequence[Speed]) -> list[float]:
    both = [(value(speed), value(on[speed.round])) for speed in speeds if speed.round in on]
    return [off / base for off, base in both if base > 0]


def _cell(ratios: Sequence[float]) -> str:
    if not ratios:
        return "-"
    middle = f"{median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f}-{max(ratios):.2f})"
