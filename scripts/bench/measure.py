"""Interleaved measurements: every repetition visits every cell, in it every server, and in the next
repetition in the opposite order, so that whatever drifts on the machine drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .competitors import Competitor, Contestant, Idle, Run
from .link import Link
from .load import LOADS, Load, Request
from .plan import Group, LinkSetting, Work
from .resident import Say, resident, turns

Cell = tuple[Work, LinkSetting]

_IDLE_ROUNDS = 2

# Asked one by one on every server: their answers do not depend on which requests share a batch.
CHECK = tuple(Load("check", [Request(length, 16)]) for length in (1, 31, 257, 900))


@dataclass
class Measurements:
    """All runs of one group, by cell and competitor, in the order of the repetitions."""

    group: Group
    runs: dict[Cell, dict[Competitor, list[Run]]] = field(default_factory=dict)
    idle: dict[Competitor, list[Idle]] = field(default_factory=dict)
    memory_mib: dict[Competitor, float] = field(default_factory=dict)
    answers: dict[Competitor, list[tuple[tuple[int, ...], ...]]] = field(default_factory=dict)
    """Of CHECK, before and after everything else."""

    @property
    def repetitions(self) -> int:
        return min((len(runs) for cell in self.runs.values() for runs in cell.values()), default=0)

    def tokens_equal(self, competitor: Competitor) -> bool:
        """Whether its answers to CHECK are those of the first competitor, each time."""
        expected = self.answers[self.group.competitors[0]][0]
        return all(answers == expected for answers in self.answers[competitor])


def measure(
    group: Group,
    links: Sequence[LinkSetting],
    link: Link,
    model: Path,
    folder: Path,
    *,
    vllm: Path | None,
    idle: bool,
    repetitions: int,
    limit_s: float,
    say: Say,
) -> Measurements:
    """Measure a group. Stops early, after a whole repetition, when another would end behind `limit_s`."""
    found = Measurements(group)
    began = time.monotonic()
    link.set(0, 0)
    # Made one by one: each takes its ports when it is about to start.
    made = (Contestant(c, group.pp, model, link, folder, vllm) for c in group.competitors)
    with resident(made, say) as contestants:
        check_answers(contestants, found)
        for repetition in range(repetitions):
            started = time.monotonic()
            for setting in links:
                link.set(setting.delay_ms, setting.rate_mbit)
                for work in group.works:
                    visit((work, setting), contestants, repetition, found)
            took = time.monotonic() - started
            say(f"pp {group.pp}: repetition {repetition + 1} of {repetitions} in {took:.0f} s")
            if time.monotonic() - began + took > limit_s and repetition + 1 < repetitions:
                say(f"pp {group.pp}: no time for another repetition")
                break
        link.set(0, 0)
        for number in range(_IDLE_ROUNDS if idle else 0):
            for contestant in turns(contestants, number):
                found.idle.setdefault(contestant.competitor, []).append(contestant.rest())
        for competitor, contestant in contestants.items():
            found.memory_mib[competitor] = contestant.memory_mib()
        check_answers(contestants, found)
    return found


def visit(
    cell: Cell, contestants: Mapping[Competitor, Contestant], repetition: int, found: Measurements
) -> None:
    """One run of a cell on every server; odd repetitions go through them backwards."""
    work, _ = cell
    for contestant in turns(contestants, repetition):
        if work.pad_ms and not contestant.competitor.is_sglang:
            continue
        run = contestant.run(LOADS[work.load], work.pad_ms / 1e3, seed=1 + repetition)
        found.runs.setdefault(cell, {}).setdefault(contestant.competitor, []).append(run)


def check_answers(contestants: Mapping[Competitor, Contestant], found: Measurements) -> None:
    for competitor, contestant in contestants.items():
        answers = [contestant.run(load, 0.0, seed=7).answers.tokens[0] for load in CHECK]
        found.answers.setdefault(competitor, []).append(tuple(answers))
