"""When forwards ran, by events of a device that is played by the test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from sglang_npu_pp.observe.forward_timer import ForwardTimer
from sglang_npu_pp.observe.trace import Trace

MS = 1_000_000  # ns
HOST_MS, DEVICE_MS = 7_000, 100  # what the clocks of host and device say at the start


@dataclass
class TimedEvent:
    """Passes when the test says so."""

    stream: str
    passed_ms: float | None = None

    def synchronize(self) -> None:
        self.passed_ms = DEVICE_MS

    def query(self) -> bool:
        return self.passed_ms is not None

    def elapsed_time(self, later: TimedEvent) -> float:
        assert self.passed_ms is not None
        assert later.passed_ms is not None
        return later.passed_ms - self.passed_ms


@dataclass
class Device:
    """Stands in for DeviceStreams, and for the context that makes the forward stream current."""

    events: list[TimedEvent] = field(default_factory=list)
    current: str = "default"

    def record_time(self) -> TimedEvent:
        self.events.append(TimedEvent(self.current))
        return self.events[-1]

    def __enter__(self) -> None:
        self.current = "forward"

    def __exit__(self, *error: object) -> None:
        self.current = "default"


class Rank:
    """A timer, its device and what it recorded."""

    def __init__(self) -> None:
        self.device, self.trace = Device(), Trace(enabled=True)
        streams: Any = self.device
        self.timer = ForwardTimer(streams, self.trace, lambda: HOST_MS * MS)

    def launch(self, iteration: int) -> tuple[TimedEvent, TimedEvent]:
        """The events around a launch, neither of which has passed."""
        stream: Any = self.device
        with self.timer.around(stream, iteration % 2, iteration):
            assert self.device.current == "default"  # the block chooses its stream itself
            begin = self.device.events[-1]
        return begin, self.device.events[-1]

    def recorded(self) -> list[tuple[float, str, int, int]]:
        return [(e.time_ns / MS, e.name, e.slot, e.iteration) for e in self.trace.events()]


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_a_forward_is_recorded_once_it_has_ended_in_times_of_the_host(rank: Rank) -> None:
    begin, end = rank.launch(5)
    rank.timer.collect()
    begin.passed_ms = DEVICE_MS + 12.5
    rank.timer.collect()
    assert rank.recorded() == []
    end.passed_ms = DEVICE_MS + 20
    rank.timer.collect()
    rank.timer.collect()
    assert rank.recorded() == [(HOST_MS + 12.5, "run", 1, 5), (HOST_MS + 20, "ran", 1, 5)]


def test_events_are_recorded_on_the_stream_of_the_forward(rank: Rank) -> None:
    assert {event.stream for event in rank.launch(0)} == {"forward"}


def test_several_forwards_may_be_under_way_and_are_recorded_in_their_order(rank: Rank) -> None:
    launches = [rank.launch(iteration) for iteration in range(3)]
    for iteration, (begin, end) in enumerate(launches[:2]):
        begin.passed_ms, end.passed_ms = DEVICE_MS + 10 * iteration, DEVICE_MS + 10 * iteration + 9
    rank.timer.collect()
    assert [(name, iteration) for _, name, _, iteration in rank.recorded()] == [
        ("run", 0),
        ("ran", 0),
        ("run", 1),
        ("ran", 1),
    ]


def test_elapsed_times_stay_short_because_their_reference_moves(rank: Rank) -> None:
    """They are 32-bit floats: an hour behind their reference they are good to a quarter of a millisecond."""
    spans = []
    original = TimedEvent.elapsed_time

    def watched(self: TimedEvent, later: TimedEvent) -> float:
        spans.append(original(self, later))
        return spans[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TimedEvent, "elapsed_time", watched)
        for minute in range(1, 61):
            begin, end = rank.launch(minute)
            begin.passed_ms, end.passed_ms = DEVICE_MS + 60_001 * minute, DEVICE_MS + 60_001 * minute + 10
            rank.timer.collect()
    assert max(spans) < 130_000
    assert rank.recorded()[-1] == (HOST_MS + 60_001 * 60 + 10, "ran", 0, 60)
