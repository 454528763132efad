"""The order of measurements. The servers are stand-ins that only note who was asked what."""

from __future__ import annotations

from pathlib import Path

from scripts.bench.competitors import OURS, PULL_REQUEST, UPSTREAM, Competitor, Run
from scripts.bench.counters import Counted, StageFile, stage_path
from scripts.bench.load import Answers, Load
from scripts.bench.measure import Measurements, visit
from scripts.bench.plan import NO_DELAY, Group, Work

COMPETITORS = tuple(Competitor(name) for name in (UPSTREAM, PULL_REQUEST, OURS))


class StandIn:
    """A contestant without a server."""

    def __init__(self, competitor: Competitor, asked: list[tuple[str, str, float, int]]) -> None:
        self.competitor, self._asked = competitor, asked

    def run(self, work: Load, pad_s: float, seed: int) -> Run:
        self._asked.append((self.competitor.design, work.name, pad_s, seed))
        return Run(Answers(1.0, 0.1, 0.1, ()), (Counted(launches=1),), 0.0)


def test_odd_repetitions_go_backwards_and_all_servers_get_the_same_prompts() -> None:
    asked: list[tuple[str, str, float, int]] = []
    contestants = {competitor: StandIn(competitor, asked) for competitor in COMPETITORS}
    found = Measurements(Group(2, COMPETITORS, ()))
    for repetition in range(2):
        visit((Work("decode", 20), NO_DELAY), contestants, repetition, found)  # type: ignore[arg-type]
    names = [UPSTREAM, PULL_REQUEST, OURS]
    assert [name for name, *_ in asked] == [*names, *reversed(names)]
    assert [seed for *_, seed in asked] == [1, 1, 1, 2, 2, 2]  # other prompts in another repetition
    assert {pad_s for _, _, pad_s, _ in asked} == {0.02}
    assert found.repetitions == 2


def test_counters_are_shared_between_two_mappings_of_the_file(tmp_path: Path) -> None:
    path = stage_path(tmp_path, 1)
    stage = StageFile.create(path)
    benchmark = StageFile(path)
    benchmark.pad_s = 0.02
    stage.add(Counted(launches=1, tokens=16, forward_s=0.02))
    before = benchmark.read()
    stage.add(Counted(launches=2, compute_s=0.5))
    assert stage.pad_s == 0.02
    assert benchmark.read() - before == Counted(launches=2, compute_s=0.5)
    assert before.tokens == 16
