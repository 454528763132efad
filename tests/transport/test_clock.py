"""Round trips and clock offsets between the stages: real processes for values, many lanes for the order.

All ranks of these tests run on one machine, whose monotonic clock they share: the true offset is known, and
the measured one may differ from it by half a round trip and not by more, however slow the machine is.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rig.harness import Here, Team, receive, results, send
from sglang_npu_pp.errors import WaitLimitError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport.clock import LinkClock, measure_clock
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.endpoints import Exchange
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import Kind

pytestmark = pytest.mark.timeout(120)

SECOND = 1_000_000_000
LIMIT_S = 20.0


def measure(here: Here, ahead_ns: int = 0, limit_s: float = LIMIT_S) -> LinkClock:
    """`ahead_ns`: how far the clock of this rank is ahead of the machine's."""
    return measure_clock(here.lane, limit_s, lambda: time.monotonic_ns() + ahead_ns)


def half_a_round_trip(clock: LinkClock, stage: int) -> float:
    return clock.round_trip_s[stage] / 2 * SECOND + 1  # one for rounding


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_every_stage_knows_its_way_to_every_other_and_to_the_clock_of_stage_0(
    team: Team, transport: str
) -> None:
    ranks = team.open_lanes(3, Settings(host_transport=transport, wait_limit_s=20))
    ahead = [0, -5000 * SECOND, 7 * SECOND]
    clocks = results([rank.start(measure, ahead[rank.index]) for rank in ranks])
    for stage, clock in enumerate(clocks):
        others = sorted({0, 1, 2} - {stage})
        assert sorted(clock.round_trip_s) == others
        for other in others:
            assert clock.round_trip_s[other] > 0
            assert clock.round_trip_s[other] == clocks[other].round_trip_s[stage]  # one measurement for both
    assert clocks[0].offset_ns == 0
    for stage in (1, 2):
        error = clocks[stage].offset_ns + ahead[stage]
        assert abs(error) <= half_a_round_trip(clocks[stage], 0)


def test_what_a_stage_pushes_behind_its_measurement_disturbs_nobody(team: Team) -> None:
    """Stage 0 is done with stage 1 while 1 and 2 measure, and may push requests then."""
    ranks = team.open_lanes(3)
    measuring = [rank.start(measure) for rank in (ranks[1], ranks[2])]
    ranks[0].call(measure)
    ranks[0].call(send, 1, Kind.REQUESTS, "first", "second")
    assert [sorted(clock.round_trip_s) for clock in results(measuring)] == [[0, 2], [0, 1]]
    assert ranks[1].call(receive, 0, Kind.REQUESTS, range(2)) == ["first", "second"]


@pytest.mark.parametrize("absent", [0, 1])
def test_a_stage_that_does_not_answer_is_named(team: Team, absent: int) -> None:
    ranks = team.open_lanes(2)
    with pytest.raises(WaitLimitError) as caught:
        ranks[1 - absent].call(measure, limit_s=0.2)
    assert str(caught.value) == (
        f"stage {1 - absent} rank 0: clock message 0 of stage {absent} did not come within 0.2 s although "
        "that stage is alive; look at its log."
    )


class Meeting:
    """An `Exchange` between threads."""

    def __init__(self, stages: int) -> None:
        self._data = [b""] * stages
        self._barrier = threading.Barrier(stages, timeout=LIMIT_S)

    def exchange(self, stage: int) -> Exchange:
        def exchange(data: bytes) -> list[bytes]:
            self._data[stage] = data
            self._barrier.wait()
            everyone = list(self._data)
            self._barrier.wait()
            return everyone

        return exchange


@pytest.mark.parametrize("stages", [2, 5, 8])
def test_any_number_of_stages_comes_to_an_end(stages: int, ipc_dir: Path) -> None:
    """The stages begin one after another, the last one first."""
    meeting = Meeting(stages)
    may_begin = [threading.Event() for _ in range(stages)]
    may_begin[-1].set()

    def live(stage: int) -> LinkClock:
        lane = HostLane(RankContext.begin(stage, stages, Settings(ipc_dir=ipc_dir, wait_limit_s=20)))
        try:
            lane.open(meeting.exchange(stage))
            assert may_begin[stage].wait(LIMIT_S)
            may_begin[stage - 1].set()
            clock = measure_clock(lane, LIMIT_S)
            meeting.exchange(stage)(b"")  # nobody leaves before all are done
            return clock
        finally:
            lane.close()

    with ThreadPoolExecutor(stages) as threads:
        clocks = list(threads.map(live, range(stages), timeout=3 * LIMIT_S))
    for stage, clock in enumerate(clocks):
        assert sorted(clock.round_trip_s) == [other for other in range(stages) if other != stage]
        assert stage == 0 or abs(clock.offset_ns) <= half_a_round_trip(clock, 0)
