"""What the notes of one stage say about the steady part of a decode load, on the simulated Ascend."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import msgspec

from ascend_sim.kernels import Stretch

from .npu_sim_probe import Host, Launch

# Forwards of a run that fill and drain the pipeline; microbatches are not full there, or not all there.
_FIRST, _LAST = 6, 6


@dataclass(frozen=True)
class Step:
    """One launch, and its forward on the device. Nanoseconds of one clock."""

    launch: Launch
    stretch: Stretch
    tokens_known: int | None  # when the host had the tokens of this microbatch


@dataclass(frozen=True)
class Steady:
    """The steady part of one run, as one stage saw it: consecutive decode steps."""

    steps: list[Step]

    @property
    def iterations(self) -> int:
        return len(self.steps) - 1

    def per_iteration_ms(self, nanoseconds: float) -> float:
        return nanoseconds / self.iterations / 1e6

    @property
    def iteration_ms(self) -> float:
        """From one forward's begin on the device to the next one's."""
        return self.per_iteration_ms(self._last.stretch.begin - self._first.stretch.begin)

    @property
    def forward_ms(self) -> float:
        """What the forwards took: as long as they are padded to, or longer if the host launched them late."""
        return self.per_iteration_ms(sum(s.stretch.end - s.stretch.begin for s in self.steps[:-1]))

    @property
    def waiting_ms(self) -> float:
        """How long the stream of the forwards waited between them: for events, so for proxies."""
        return self.per_iteration_ms(sum(self._between("waited")))

    @property
    def other_work_ms(self) -> float:
        """What the device did between them on that stream."""
        return self.per_iteration_ms(sum(self._between("tasks"))) - self.waiting_ms

    @property
    def idle_ms(self) -> float:
        """How long that stream had nothing to do between them."""
        return self.iteration_ms - self.forward_ms - self.waiting_ms - self.other_work_ms

    def _between(self, what: str) -> list[int]:
        return [
            getattr(later.stretch, f"{what}_before") - getattr(step.stretch, f"{what}_by_end")
            for step, later in pairwise(self.steps)
        ]

    @property
    def host(self) -> Host:
        """Of all iterations together, nanoseconds."""
        return self._last.launch.host - self._first.launch.host

    @property
    def launching_ms(self) -> float:
        """How long the host takes to launch a forward."""
        return self.per_iteration_ms(sum(s.launch.ended - s.launch.began for s in self.steps[:-1]))

    @property
    def _first(self) -> Step:
        return self.steps[0]

    @property
    def _last(self) -> Step:
        return self.steps[-1]


def read_notes(path: Path, began: int, ended: int) -> Steady:
    """The steady part of the run between these moments. Raises ValueError when there is next to none."""
    launches = [msgspec.json.decode(line, type=Launch) for line in path.read_bytes().splitlines()]
    stretches = [Stretch(*stretch) for launch in launches for stretch in launch.stretches]
    steps = []
    for position, launch in enumerate(launches):
        if began <= launch.began <= ended and launch.forward < len(stretches):
            known = _tokens_known(launches[position + 1 :], launch)
            steps.append(Step(launch, stretches[launch.forward], known))
    steady = _longest_in_a_row([step for step in steps if step.launch.decode])[_FIRST:-_LAST]
    if len(steady) < 10:
        raise ValueError(
            f"{path} has {len(steady)} steady decode steps in a row; the load was not what it should be"
        )
    return Steady(steady)


def _longest_in_a_row(steps: list[Step]) -> list[Step]:
    """Prefills of late requests stand between others."""
    rows: list[list[Step]] = [[]]
    for step in steps:
        if rows[-1] and step.launch.forward != rows[-1][-1].launch.forward + 1:
            rows.append([])
        rows[-1].append(step)
    return max(rows, key=len)


def _tokens_known(later: list[Launch], launch: Launch) -> int | None:
    for other in later[:16]:
        for slot, moment in other.results:
            if slot == launch.slot and moment >= launch.began:
                return moment
    return None
