"""Stage 0 decides on no more than is ready everywhere, and in the end on everything."""

from __future__ import annotations

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from sglang_npu_pp.ready_counts import Counts, ReadyCounts, left

STAGES, QUEUES = 3, 2
ROUNDS = st.lists(
    st.tuples(
        st.lists(st.lists(st.integers(0, 2), min_size=QUEUES, max_size=QUEUES), min_size=3, max_size=3),
        st.lists(st.integers(0, 3), min_size=STAGES, max_size=STAGES),
    ),
    max_size=30,
)


def test_a_stage_that_has_not_reported_has_nothing() -> None:
    counts = ReadyCounts(3)
    counts.report(1, 0, (4, 4))
    assert counts.limit([2, 3]) == [0, 0]
    counts.report(2, 0, (1, 9))
    assert counts.limit([2, 3]) == [1, 3]


def test_what_was_decided_since_a_report_is_subtracted() -> None:
    """Also what is decided in the iteration of the report, which is carried out behind it."""
    counts = ReadyCounts(2)
    counts.report(1, 5, (3,))
    found = []
    for iteration in range(5, 9):
        found += counts.limit([2])
        counts.decide(iteration, (1,))
    assert found == [2, 2, 1, 0]
    counts.report(1, 8, (2,))
    assert counts.limit([2]) == [1]


def test_queues_that_a_report_does_not_have_yet_are_empty() -> None:
    counts = ReadyCounts(2)
    counts.report(1, 0, (3,))
    assert counts.limit([1, 1]) == [1, 0]
    counts.decide(0, (1, 1))
    assert counts.limit([5]) == [2]


def test_what_is_left() -> None:
    assert left((3, 1), (1,)) == (2, 1)
    assert left((3,), (5, 1)) == (0,)


class Stage:
    """What has finished on a stage, in which iteration it is, and the reports that are on their way."""

    def __init__(self) -> None:
        self.ready: list[int] = [0] * QUEUES
        self.reported: Counts = ()
        self.iteration = 0
        self.under_way: deque[tuple[int, Counts]] = deque()

    def run(self, decision: Counts) -> None:
        if (ready := tuple(self.ready)) != self.reported:
            self.reported = ready
            self.under_way.append((self.iteration, ready))
        for queue, count in enumerate(decision):
            assert count <= self.ready[queue], "this stage would have to wait"
            self.ready[queue] -= count
        self.reported = left(self.reported, decision)
        self.iteration += 1


@given(ROUNDS)
def test_no_stage_waits_and_nothing_is_forgotten(rounds: list[tuple[list[list[int]], list[int]]]) -> None:
    """Later stages are any number of iterations behind, and reports arrive any time later."""
    counts, first = ReadyCounts(STAGES), [0] * QUEUES
    later = {stage: Stage() for stage in range(1, STAGES)}
    decisions: list[Counts] = []

    def decide() -> None:
        decision = tuple(counts.limit(first))
        counts.decide(len(decisions), decision)
        decisions.append(decision)
        for queue, count in enumerate(decision):
            first[queue] -= count

    def follow(stage: Stage, iterations: int) -> None:
        for decision in decisions[stage.iteration : stage.iteration + iterations]:
            stage.run(decision)

    def arrive(number: int, reports: int) -> None:
        under_way = later[number].under_way
        for _ in range(min(reports, len(under_way))):
            counts.report(number, *under_way.popleft())

    for finished, progress in rounds:
        for queue in range(QUEUES):
            first[queue] += finished[0][queue]
            for number, stage in later.items():
                stage.ready[queue] += finished[number][queue]
        decide()
        for number, stage in later.items():
            follow(stage, progress[number])
            arrive(number, progress[0])
    for _ in range(3):  # all catch up: their reports, the decision, and its execution
        for number, stage in later.items():
            follow(stage, len(decisions))
            arrive(number, len(stage.under_way))
        decide()
    for queue in range(QUEUES):
        assert 0 in (first[queue], *(stage.ready[queue] for stage in later.values()))
