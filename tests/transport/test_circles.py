"""Whatever the bounds of memory are, stages never wait for each other in a circle: a search for one.

The event loop of every stage runs here over real windows and meters, without sockets: a stage goes on as
long as it can, and the search is for a state in which none can. Proxies also take the device lane: its sends
are rendezvous, and block the host while their slot is in use, as on gloo. Sends and receives: early or late.
"""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.window import Bounds, CreditMeter, Window

Step = Generator[bool, None, None]
"""One stage; yields where it cannot go on: True in a wait of ours, which takes in headers, False on gloo."""


class Sends(enum.Enum):
    """Where a stage sends its proxies."""

    BEHIND_THE_LAUNCH = "SGLANG_NPU_PP_EARLY_SEND=1"
    AT_THE_END = "0: at the end of the iteration, upstream's place"
    IN_THE_NEXT = "planted: behind the requests of the next iteration, and what they agree on"


@dataclass
class Channel:
    """Messages of one kind from one stage to another. Credit comes back at once, or when it is let."""

    bounds: Bounds
    window: Window = field(init=False)
    meter: CreditMeter = field(init=False)
    arrived: deque[int] = field(default_factory=deque)
    most: int = 0

    def __post_init__(self) -> None:
        self.window, self.meter = Window(self.bounds), CreditMeter(self.bounds)

    def push(self, nbytes: int) -> Step:
        while not self.window.has_room(nbytes):
            yield True
        self.window.sent(nbytes)
        self.arrived.append(nbytes)
        self.most = max(self.most, sum(self.arrived))

    def take(self) -> Step:
        while not self.arrived:
            yield True
        if self.meter.take(self.arrived.popleft()):
            self.window.credit(self.meter.reported_messages, self.meter.reported_bytes)


@dataclass
class Lane:
    """The device lane between two neighbours: numbers of messages. A send ends when its receive is posted."""

    slots: int
    early: bool
    sent: int = 0
    announced: int = 0  # headers that the receiver has taken in
    posted: int = 0
    released: int = 0

    def send(self) -> Step:
        while self.sent - self.posted >= self.slots:  # the slot's last message
            yield False
        self.sent += 1

    def pump(self, headers: int) -> None:
        """In a wait of the receiver: headers that are here post their receives, if early."""
        self.announced = headers
        if self.early:
            self.post(self.announced)

    def post(self, end: int) -> None:
        """In order, as far as slots are free."""
        self.posted = max(self.posted, min(end, self.released + self.slots))

    def receive(self, number: int) -> Step:
        """Its header is here. The message itself comes when it is sent, from a slot that it has got."""
        self.post(number + 1)
        assert self.posted > number, "all receive slots are held"
        while self.sent <= number:
            yield False

    def release(self) -> None:
        self.released += 1
        if self.early:
            self.post(self.announced)


@dataclass(frozen=True)
class Plan:
    """What a run is made of. `batches`: sizes (requests, proxy, output) by iteration; None runs no batch.
    `control`: iterations whose requests end with one on which the stages agree. `lane_slots`: of the device
    lane; 0 without one. `cache`: a hierarchical one, on which they agree in every iteration."""

    stages: int
    depth: int
    window: int
    window_bytes: int
    batches: Sequence[tuple[int, int, int] | None]
    control: frozenset[int] = frozenset()
    sends: Sends = Sends.BEHIND_THE_LAUNCH
    early_receive: bool = True
    lane_slots: int = 0
    cache: bool = False

    @property
    def slots(self) -> int:
        return self.stages + self.depth


Channels = dict[tuple[int, int, Kind], Channel]


class Pipeline:
    """Channels and device lanes of all stages."""

    def __init__(self, plan: Plan, bounds: Bounds) -> None:
        stages = range(plan.stages)
        self.channels: Channels = {
            (a, b, kind): Channel(bounds) for a in stages for b in stages for kind in Kind
        }
        slots = plan.lane_slots
        self.lanes = [Lane(slots, plan.early_receive) for _ in range(plan.stages - 1)] if slots else []

    @property
    def state(self) -> object:
        channels = [(c.window.sent_messages, c.meter.taken_messages) for c in self.channels.values()]
        return channels, [(lane.sent, lane.posted, lane.released) for lane in self.lanes]

    def pump(self, stage: int) -> None:
        """What a wait of `stage` takes in."""
        if self.lanes and stage > 0:
            headers = self.channels[stage - 1, stage, Kind.PROXY].window.sent_messages
            self.lanes[stage - 1].pump(headers)

    def push_proxies(self, stage: int, nbytes: int) -> Step:
        yield from self.channels[stage, stage + 1, Kind.PROXY].push(nbytes)
        if self.lanes:
            yield from self.lanes[stage].send()
            self.release(stage)

    def release(self, stage: int) -> None:
        """Behind what reads the proxies of `stage` last."""
        if self.lanes and stage > 0:
            self.lanes[stage - 1].release()

    def take_proxies(self, stage: int) -> Step:
        channel = self.channels[stage - 1, stage, Kind.PROXY]
        yield from channel.take()
        if self.lanes:
            yield from self.lanes[stage - 1].receive(channel.meter.taken_messages - 1)


def run_stage(plan: Plan, stage: int, pipeline: Pipeline) -> Step:
    """`event_loop_pp` with our seams, as far as messages are concerned."""
    last, channels = plan.stages - 1, pipeline.channels
    unsent: Step | None = None
    for iteration, batch in enumerate([*plan.batches, *[None] * plan.slots]):
        if stage > 0:
            yield from channels[stage - 1, stage, Kind.REQUESTS].take()
        if stage < last:
            yield from channels[stage, stage + 1, Kind.REQUESTS].push(batch[0] if batch else 100)
        if plan.cache:
            yield from synchronise_cache(plan, stage, channels)
        if iteration in plan.control:
            yield from agree(plan, stage, channels)
        if unsent is not None and plan.sends is Sends.IN_THE_NEXT:
            yield from unsent
            unsent = None
        if batch is not None:
            yield from launch(plan, stage, pipeline, batch)
            if stage < last:
                unsent = pipeline.push_proxies(stage, batch[1])
        if unsent is not None and plan.sends is Sends.BEHIND_THE_LAUNCH:
            yield from unsent
            unsent = None
        finished = iteration + 1 - plan.slots
        if stage < last and 0 <= finished < len(plan.batches) and plan.batches[finished] is not None:
            yield from channels[last, stage, Kind.OUTPUT].take()
        if unsent is not None and plan.sends is Sends.AT_THE_END:
            yield from unsent
            unsent = None


def launch(plan: Plan, stage: int, pipeline: Pipeline, batch: tuple[int, int, int]) -> Step:
    """Wait for the proxies, launch; the last stage sends its outputs."""
    last = plan.stages - 1
    if stage > 0:
        yield from pipeline.take_proxies(stage)
    if stage == last:
        pipeline.release(stage)
        for other in range(last):
            yield from pipeline.channels[last, other, Kind.OUTPUT].push(batch[2])


def agree(plan: Plan, stage: int, channels: Channels) -> Step:
    """What became of a control request: told to all others, then heard from all others."""
    others = [other for other in range(plan.stages) if other != stage]
    for other in others:
        yield from channels[stage, other, Kind.OUTCOME].push(100)
    for other in others:
        yield from channels[other, stage, Kind.OUTCOME].take()


def synchronise_cache(plan: Plan, stage: int, channels: Channels) -> Step:
    """Later stages report if there is room, and wait for stage 0's decision; stage 0 takes what is there."""
    if stage == 0:
        for other in range(1, plan.stages):
            reports = channels[other, 0, Kind.CACHE]
            while reports.arrived:
                yield from reports.take()
        for other in range(1, plan.stages):
            yield from channels[0, other, Kind.CACHE].push(100)
        return
    if channels[stage, 0, Kind.CACHE].window.has_room(100):
        yield from channels[stage, 0, Kind.CACHE].push(100)
    yield from channels[0, stage, Kind.CACHE].take()


def stages_that_hang(plan: Plan, bounds: Bounds | None = None) -> list[int]:
    """Run all stages until none can go on; those that have not come to their end."""
    bounds = bounds or Bounds.for_loops(plan.window, plan.window_bytes, plan.slots)
    pipeline = Pipeline(plan, bounds)
    running = {stage: run_stage(plan, stage, pipeline) for stage in range(plan.stages)}
    listening = dict.fromkeys(running, True)
    before = None
    while running:
        if pipeline.state == before:
            return sorted(running)
        before = pipeline.state
        for stage in list(running):
            if listening[stage]:
                pipeline.pump(stage)
            # As far as it gets: a greedy stage fills what can be filled before another one takes.
            waits = next(running[stage], None)
            if waits is None:
                del running[stage]
            else:
                listening[stage] = waits
    return []


MIB = 1 << 20
SIZES = st.one_of(st.integers(1, 4 * MIB), st.sampled_from([1, 1000, MIB - 1, MIB, MIB + 1, 60 * MIB]))
PLANS = st.builds(
    Plan,
    stages=st.integers(2, 4),
    depth=st.integers(0, 3),
    window=st.integers(1, 20),
    window_bytes=st.sampled_from([1, MIB, 2 * MIB, 64 * MIB]),
    batches=st.lists(st.one_of(st.none(), st.tuples(SIZES, SIZES, SIZES)), min_size=1, max_size=25),
    control=st.frozensets(st.integers(0, 24), max_size=25),
    sends=st.sampled_from([Sends.BEHIND_THE_LAUNCH, Sends.AT_THE_END]),
    early_receive=st.booleans(),
    lane_slots=st.sampled_from([0, 2, 4]),
    cache=st.booleans(),
)


@pytest.mark.slow
@settings(max_examples=900)
@given(PLANS)
def test_no_bounds_no_sizes_and_no_switches_make_the_stages_wait_for_each_other(plan: Plan) -> None:
    assert stages_that_hang(plan) == []


@pytest.mark.parametrize(
    ("mib", "proxy", "output"), [(1, 0.6, 0.6), (64, 60, 40)], ids=["small messages", "large messages"]
)
def test_bounds_that_do_not_know_the_loops_hang(mib: int, proxy: float, output: float) -> None:
    """Depth 2, as the window was before: the search can find what it looks for."""
    sizes = (100, int(proxy * MIB), int(output * MIB))
    plan = Plan(stages=2, depth=2, window=16, window_bytes=mib * MIB, batches=[sizes] * 12)
    assert stages_that_hang(plan, Bounds(16, mib * MIB)) == [0, 1]
    assert stages_that_hang(plan) == []


@pytest.mark.parametrize("early_receive", [True, False])
@pytest.mark.parametrize(("sends", "hang"), [(Sends.AT_THE_END, []), (Sends.IN_THE_NEXT, [0, 1])])
def test_proxies_that_leave_behind_the_next_agreement_hang(
    sends: Sends, hang: list[int], early_receive: bool
) -> None:
    """Stage 0 waits for the outcome of stage 1, that one for the proxies: the search finds such an order."""
    plan = Plan(
        stages=2,
        depth=1,
        window=16,
        window_bytes=MIB,
        batches=[(100, 1000, 1000)] * 6,
        control=frozenset({3}),
        sends=sends,
        early_receive=early_receive,
        lane_slots=2,
    )
    assert stages_that_hang(plan) == hang


def test_a_receive_slot_for_each_message_that_is_used_at_once() -> None:
    """The model of the lane: a third message has no slot before the first is released."""
    lane = Lane(slots=2, early=False, sent=2, announced=3)
    for number in range(2):
        assert list(lane.receive(number)) == []
    with pytest.raises(AssertionError, match="all receive slots are held"):
        next(lane.receive(2))


@given(PLANS)
@example(
    Plan(
        stages=2, depth=0, window=8, window_bytes=MIB, batches=[(1, MIB // 2, MIB // 2)], control=frozenset()
    )
)
def test_memory_is_bounded_all_the_same(plan: Plan) -> None:
    """By the bytes that were set, or by as many of the largest messages as the loops need, and less than a
    quarter of these bytes that may have been taken without a report."""
    bounds = Bounds.for_loops(plan.window, plan.window_bytes, plan.slots)
    channel = Channel(bounds)
    sizes = [size for batch in plan.batches if batch for size in batch]
    for size in sizes:
        if channel.window.has_room(size):
            channel.window.sent(size)
            channel.arrived.append(size)
    largest = max(sizes, default=0)
    assert sum(channel.arrived) <= max(plan.window_bytes, plan.slots * largest + plan.window_bytes // 4)
    assert len(channel.arrived) <= max(plan.window, 2 * plan.slots)
