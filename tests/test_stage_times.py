"""Which launches are measured and when forwards ran, without waiting for a device; stage 0 hears others."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_npu_pp.observe import stage_times
from sglang_npu_pp.observe.stage_times import (
    LAUNCH_LIMIT,
    SAMPLES,
    WARM_UP,
    DepthAdviser,
    ForwardTimer,
    StageTimer,
)
from sglang_npu_pp.observe.telemetry import Telemetry
from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transport.clock import LinkClock
from sglang_npu_pp.transport.message import Kind

SLOTS = 2
ENOUGH = SLOTS + WARM_UP + SAMPLES  # launches in a row


class Clock:
    """Stands in for `time` in the module."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        monkeypatch.setattr(stage_times, "time", SimpleNamespace(monotonic=lambda: self.now_s))

    def work(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Loop:
    """Launches that take 10 ms, 3 ms of host work between them, and 4 ms of waiting for outputs."""

    def __init__(self, clock: Clock, timed: StageTimer | DepthAdviser, telemetry: Telemetry) -> None:
        self._clock, self._timed, self._telemetry = clock, timed, telemetry
        self.iteration = 0

    def launch(self, kind: str, forward_s: float = 0.010) -> None:
        self._clock.work(0.003)
        self._timed.begin(kind, self.iteration)
        self._clock.work(forward_s)
        self._timed.end()
        self._clock.work(0.004)
        self._telemetry.receiving("output").wait_s += 0.004
        self.iteration += 1

    def leave_out(self) -> None:
        """A slot without a batch."""
        self.iteration += 1


def test_medians_of_busy_launches_behind_the_warm_up(clock: Clock) -> None:
    telemetry = Telemetry(0, 0)
    timer = StageTimer(DeviceStreams("cpu"), telemetry, SLOTS)
    loop = Loop(clock, timer, telemetry)
    for _ in range(SLOTS + WARM_UP):
        loop.launch("decode", forward_s=0.5)
    for number in range(SAMPLES):
        assert timer.read("decode", 0.001) is None
        loop.launch("decode", forward_s=0.9 if number == 3 else 0.010)
    for _ in range(SAMPLES):
        loop.launch("decode", forward_s=7.0)  # too late to count
    times = timer.read("decode", 0.001)
    assert times is not None
    assert (times.forward_s, times.host_s, times.hop_s) == pytest.approx((0.010, 0.003, 0.001))
    assert not times.asynchronous
    assert timer.read("prefill", 0.001) is None


def test_the_host_works_before_and_behind_the_arrival_of_outputs(clock: Clock) -> None:
    """Launches of 10 ms; 5 ms of host work, a wait of 4 ms, and 3 ms more, of which 2 are another wait."""
    telemetry = Telemetry(0, 0)
    timer = StageTimer(DeviceStreams("cpu"), telemetry, SLOTS)

    def wait(kind: str, seconds: float) -> None:
        clock.work(seconds)
        telemetry.receiving(kind).wait_s += seconds

    for iteration in range(ENOUGH):
        timer.begin("decode", iteration)
        clock.work(0.010)
        timer.end()
        clock.work(0.005)
        wait("output", 0.004)
        timer.arrived()
        clock.work(0.001)
        wait("requests", 0.002)
    times = timer.read("decode", 0.001)
    assert times is not None
    assert (times.forward_s, times.host_s, times.turn_s) == pytest.approx((0.010, 0.006, 0.001))


def test_launches_count_only_while_every_slot_is_taken_by_the_same_kind(clock: Clock) -> None:
    telemetry = Telemetry(0, 0)
    timer = StageTimer(DeviceStreams("cpu"), telemetry, SLOTS)
    loop = Loop(clock, timer, telemetry)
    for _ in range(10 * SAMPLES):
        loop.launch("decode")
        loop.leave_out()  # one request: one slot is empty
    for _ in range(10 * SAMPLES):
        loop.launch("prefill")
        loop.launch("decode")
    for _ in range(10 * SAMPLES):
        loop.launch("idle")
    assert timer.busy_launches == 0
    for _ in range(ENOUGH):
        loop.launch("prefill")
    assert timer.read("prefill", 0.0) is not None


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device, self._number = device, device.recorded
        device.recorded += 1

    def query(self) -> bool:
        return self._number < self._device.passed

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query(), "this would block the host"
        return 20.0 * (end._number - self._number)


class FakeDevice:
    """Streams of a device that has passed the first `passed` events."""

    asynchronous = True

    def __init__(self) -> None:
        self.recorded = self.passed = 0

    def record_time(self) -> FakeEvent:
        return FakeEvent(self)


def test_a_device_is_asked_and_never_waited_for(clock: Clock) -> None:
    device, telemetry = FakeDevice(), Telemetry(0, 0)
    timer = StageTimer(device, telemetry, SLOTS)  # type: ignore[arg-type]
    loop = Loop(clock, timer, telemetry)
    for _ in range(ENOUGH):
        loop.launch("decode")
    assert timer.read("decode", 0.0) is None
    device.passed = device.recorded
    loop.launch("decode")
    times = timer.read("decode", 0.0)
    assert times is not None
    assert (times.forward_s, times.host_s) == pytest.approx((0.020, 0.003))
    assert times.asynchronous


class FakeLink:
    """One rank of a pipeline of two; what is pushed to stage 0 is in `mailbox`."""

    stages = 2

    def __init__(self, stage: int, mailbox: deque[Any], hop_s: float) -> None:
        self.stage, self._mailbox = stage, mailbox
        self.telemetry = Telemetry(stage, 0)
        self.clock = LinkClock({1 - stage: 2 * hop_s}, 0)

    def push(self, kind: Kind, peer: int, values: Any) -> None:
        assert (self.stage, kind, peer) == (1, Kind.STAGE_TIMES, 0)
        self._mailbox.append(values)

    def has_arrived(self, kind: Kind, source: int) -> bool:
        assert (source, kind) == (1, Kind.STAGE_TIMES)
        return bool(self._mailbox)

    def post(self, kind: Kind, source: int) -> Any:
        return SimpleNamespace(wait_values=self._mailbox.popleft)


class Pair:
    """The advisers of two stages, each with its own loop."""

    def __init__(self, clock: Clock, hop_s: float = 0.005) -> None:
        mailbox: deque[Any] = deque()
        self.links = [FakeLink(stage, mailbox, hop_s) for stage in (0, 1)]
        self.advisers = [DepthAdviser(link, DeviceStreams("cpu"), 0) for link in self.links]  # type: ignore[arg-type]
        self.loops = [
            Loop(clock, adviser, link.telemetry)
            for adviser, link in zip(self.advisers, self.links, strict=True)
        ]

    def launch(self, kind: str, count: int) -> None:
        for _ in range(count):
            self.links[0].telemetry.sending("proxy").bytes += 3 << 20
            for stage, loop in enumerate(self.loops):
                loop.launch(kind, forward_s=0.010 + 0.010 * stage)


def test_stage_0_speaks_when_all_stages_have_measured_both_kinds(clock: Clock) -> None:
    pair = Pair(clock)
    pair.launch("prefill", ENOUGH)
    assert not pair.advisers[0].finished
    pair.launch("decode", ENOUGH + 1)  # stage 1 comes last: heard with the next launch
    assert [adviser.finished for adviser in pair.advisers] == [True, True]
    text = pair.advisers[0].advice(32, None)
    assert text.startswith(
        "2 stages, hops of 5 ms one way, forwards of 10 to 20 ms (prefill) and 10 to 20 ms (decode): "
    )
    assert list(pair.links[1].telemetry.sent) == []


def test_a_kind_that_does_not_come_is_not_waited_for(clock: Clock) -> None:
    pair = Pair(clock)
    pair.launch("prefill", LAUNCH_LIMIT + SLOTS - 1)
    assert not pair.advisers[0].finished
    pair.launch("prefill", 1)
    assert pair.advisers[0].finished
    text = pair.advisers[0].advice(32, None)
    assert "forwards of 10 to 20 ms (prefill): " in text
    assert "decode" not in text


def test_the_size_of_a_proxy_is_that_of_the_largest(clock: Clock) -> None:
    pair = Pair(clock, hop_s=0.1)
    pair.launch("prefill", LAUNCH_LIMIT + SLOTS)
    assert pair.advisers[0].advice(32, None).endswith("a proxy has up to 3.0 MiB")


# --- when forwards ran, by events of a device that is played by the test ------------------------

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
