"""Rows and table of a run on the simulated Ascend."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

from rich.table import Table

from scripts.output import number_table, plain_console

from . import load
from .competitors import Competitor
from .npu_sim_notes import Steady, Step

DEVICE = "simulated Ascend: not a measurement of an Ascend"


@dataclass(frozen=True)
class Cell:
    """What a forward takes on the device, and what links do."""

    forward_ms: float
    latency_ms: float
    gb_per_s: float


@dataclass(frozen=True)
class Run:
    """One load on one server."""

    answers: load.Answers
    stages: Sequence[Steady]
    load_average: float


@dataclass
class Measurements:
    """All runs of one pipeline size, in the order of the repetitions."""

    pp: int
    competitors: Sequence[Competitor]
    runs: dict[Cell, dict[Competitor, list[Run]]] = field(default_factory=dict)
    hung: list[Competitor] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One server in one cell: medians over its runs, in milliseconds of an iteration, one forward of a stage.

    An iteration is the forward that was asked for, other work of the device on that stream, and what is
    exposed of everything else: a host that launches too slowly for the forward, the stream waiting for
    proxies, and the stream idle because the host is late. The round of one microbatch, of which `slots` are
    under way, is made of forwards, flights, the way of the tokens to stage 0, and what its host does until
    the next forward begins on the device.
    """

    forward_ms: float
    latency_ms: float
    gb_per_s: float
    pp: int
    depth: int
    competitor: str
    n: int
    ratio_median: float  # of upstream's iteration to this one, by pairs
    ratio_min: float
    ratio_max: float
    tokens_equal: bool
    iteration_ms: float
    other_work_ms: float  # of the device on the busiest stage's forward stream, between forwards
    launch_bound_ms: float  # forwards are longer than asked for: the host launches them too slowly
    waiting_ms: float  # that stream waits for proxies
    idle_ms: float  # it has nothing to do: its host is late
    exposed_percent: float  # the last three
    transfers_percent: float  # of the iteration: flights and the way of the tokens, were nothing hidden
    flight_ms: float  # from the end of a forward to the begin of the next stage's, longest hop
    tokens_home_ms: float  # from the end of the last stage's forward to stage 0's host
    host_turn_ms: float  # from there to the begin of its next forward on the device
    launching_ms: float  # the host launches a forward; longest of the stages
    host_cpu_ms: float  # the scheduler thread is on a core; longest of the stages
    in_receives_ms: float  # it stands in receives and sends: gloo, proxies, back-pressure; longest
    in_requests_ms: float  # it waits for the requests of an iteration
    in_outputs_ms: float  # it waits for tokens on the host lane
    in_device_ms: float  # it stands in calls of CANN; the last stage waits for its tokens there
    load_average: float


def rows(found: Measurements) -> list[Row]:
    """A row for every cell and server. Ratios are against the first server that does not hang."""
    reference = next(competitor for competitor in found.competitors if competitor not in found.hung)
    return [
        _row(found.pp, cell, competitor, own, runs[reference])
        for cell, runs in found.runs.items()
        for competitor, own in runs.items()
    ]


def _row(pp: int, cell: Cell, competitor: Competitor, own: Sequence[Run], reference: Sequence[Run]) -> Row:
    def median(value: Callable[[Run], float]) -> float:
        return round(statistics.median(map(value, own)), 3)

    def longest(value: Callable[[Steady], float]) -> float:
        return median(lambda run: max(map(value, run.stages)))

    ratios = [
        busiest(other).iteration_ms / busiest(run).iteration_ms
        for run, other in zip(own, reference, strict=True)
    ]
    return Row(
        **asdict(cell),
        pp=pp,
        depth=competitor.depth,
        competitor=competitor.design,
        n=len(own),
        ratio_median=round(statistics.median(ratios), 3),
        ratio_min=round(min(ratios), 3),
        ratio_max=round(max(ratios), 3),
        tokens_equal=all(
            run.answers.tokens == other.answers.tokens for run, other in zip(own, reference, strict=True)
        ),
        iteration_ms=median(lambda run: busiest(run).iteration_ms),
        other_work_ms=median(lambda run: busiest(run).other_work_ms),
        launch_bound_ms=median(lambda run: busiest(run).forward_ms - cell.forward_ms),
        waiting_ms=median(lambda run: busiest(run).waiting_ms),
        idle_ms=median(lambda run: busiest(run).idle_ms),
        exposed_percent=median(lambda run: _exposed_percent(busiest(run), cell)),
        transfers_percent=median(lambda run: _transfers_percent(run, pp + competitor.depth)),
        flight_ms=median(_flight_ms),
        tokens_home_ms=median(_tokens_home_ms),
        host_turn_ms=median(lambda run: _host_turn_ms(run.stages[0], pp + competitor.depth)),
        launching_ms=longest(lambda stage: stage.launching_ms),
        host_cpu_ms=longest(lambda stage: stage.per_iteration_ms(stage.host.cpu)),
        in_receives_ms=longest(_in_receives_ms),
        in_requests_ms=longest(lambda stage: stage.per_iteration_ms(stage.host.requests)),
        in_outputs_ms=longest(lambda stage: stage.per_iteration_ms(stage.host.outputs)),
        in_device_ms=longest(lambda stage: stage.per_iteration_ms(stage.host.device)),
        load_average=round(max(run.load_average for run in own), 1),
    )


def busiest(run: Run) -> Steady:
    """The stage whose stream has most to do: the rest of its iteration is what could be saved."""
    return max(run.stages, key=lambda stage: stage.forward_ms + stage.other_work_ms)


def _exposed_percent(stage: Steady, cell: Cell) -> float:
    return 100 * (1 - (cell.forward_ms + stage.other_work_ms) / stage.iteration_ms)


def _transfers_percent(run: Run, slots: int) -> float:
    """A round has a flight between any two stages and one way home, and `slots` iterations."""
    round_ms = slots * run.stages[0].iteration_ms
    return 100 * ((len(run.stages) - 1) * _flight_ms(run) + _tokens_home_ms(run)) / round_ms


def _in_receives_ms(stage: Steady) -> float:
    host = stage.host
    return stage.per_iteration_ms(host.gloo + host.proxies + host.backpressure)


def _flight_ms(run: Run) -> float:
    return max(
        _median_ms(
            later.stretch.begin - earlier.stretch.end
            for earlier, later in zip(before.steps, after.steps, strict=False)
        )
        for before, after in pairwise(run.stages)
    )


def _tokens_home_ms(run: Run) -> float:
    pairs = zip(run.stages[0].steps, run.stages[-1].steps, strict=False)
    return _median_ms(
        first.tokens_known - last.stretch.end for first, last in pairs if first.tokens_known is not None
    )


def _host_turn_ms(stage: Steady, slots: int) -> float:
    following: Sequence[Step] = stage.steps[slots:]
    return _median_ms(
        later.stretch.begin - step.tokens_known
        for step, later in zip(stage.steps, following, strict=False)
        if step.tokens_known is not None
    )


def _median_ms(nanoseconds: object) -> float:
    values = list(nanoseconds)  # type: ignore[call-overload]
    return statistics.median(values) / 1e6 if values else float("nan")


def show(made: Sequence[Row], hung: Sequence[str]) -> None:
    console = plain_console(150)
    for pp in dict.fromkeys(row.pp for row in made):
        console.print(_table(pp, [row for row in made if row.pp == pp]))
    for name in hung:
        console.print(f"Hangs in the warm-up, and is left out: {name}.")
    if any(row.pp > 2 for row in made):
        console.print(f"pp 4: the hosts of four stages share {os.cpu_count()} cores here.")


def _table(pp: int, made: Sequence[Row]) -> Table:
    columns: dict[str, Callable[[Row], str]] = {
        "forward": lambda row: f"{row.forward_ms:g}",
        "link": lambda row: f"{row.latency_ms:g} ms {row.gb_per_s:g} GB/s",
        "server": lambda row: row.competitor + (f" depth {row.depth}" if row.depth else ""),
        "iteration": lambda row: f"{row.iteration_ms:.2f}",
        "times upstream": lambda row: f"{row.ratio_median:.2f} [{row.ratio_min:.2f}..{row.ratio_max:.2f}]",
        "exposed %": lambda row: f"{row.exposed_percent:.1f}",
        "slow launch": lambda row: f"{row.launch_bound_ms:.2f}",
        "waits": lambda row: f"{row.waiting_ms:.2f}",
        "idle": lambda row: f"{row.idle_ms:.2f}",
        "flight": lambda row: f"{row.flight_ms:.2f}",
        "tokens home": lambda row: f"{row.tokens_home_ms:.2f}",
        "host turn": lambda row: f"{row.host_turn_ms:.2f}",
        "in receives": lambda row: f"{row.in_receives_ms:.2f}",
        "tokens": lambda row: "equal" if row.tokens_equal else "OTHER",
    }
    table = number_table(f"pp {pp}, {DEVICE}; ms an iteration", *columns, left=3)
    for row in made:
        table.add_row(*(text(row) for text in columns.values()))
    return table


def write_json(path: Path, made: Sequence[Row], hung: Sequence[str], seconds: float) -> None:
    conditions = {
        "device": DEVICE,
        "hung": hung,
        "seconds": round(seconds),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("sglang", "torch")},
        "bytes": "links carry the tiny model's messages at 1/16 of the rate, as those of hidden size 4096",
    }
    path.write_text(json.dumps({"conditions": conditions, "rows": [asdict(row) for row in made]}, indent=1))
