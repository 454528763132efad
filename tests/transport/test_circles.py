"""Whatever the bounds of memory are, stages never wait for each other in a circle: a search for one.

The event loop of every stage runs here over real windows and meters, without sockets: a stage goes on as
long as it can, and the search is for a state in which none can.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.window import Bounds, CreditMeter, Window

Step = Generator[None, None, None]
"""One stage; yields where it cannot go on."""


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
            yield
        self.window.sent(nbytes)
        self.arrived.append(nbytes)
        self.most = max(self.most, sum(self.arrived))

    def take(self) -> Step:
        while not self.arrived:
            yield
        if self.meter.take(self.arrived.popleft()):
            self.window.credit(self.meter.reported_messages, self.meter.reported_bytes)


@dataclass(frozen=True)
class Plan:
    """What a run is made of. `batches`: sizes (requests, proxy, output) by iteration; None runs no batch.
    `control`: iterations whose requests end with one on which the stages agree."""

    stages: int
    depth: int
    window: int
    window_bytes: int
    batches: Sequence[tuple[int, int, int] | None]
    control: frozenset[int] = frozenset()

    @property
    def slots(self) -> int:
        return self.stages + self.depth


def run_stage(plan: Plan, stage: int, channels: dict[tuple[int, int, Kind], Channel]) -> Step:
    """`event_loop_pp` with our seams, as far as messages are concerned."""
    last = plan.stages - 1
    for iteration, batch in enumerate([*plan.batches, *[None] * plan.slots]):
        if stage > 0:
            yield from channels[stage - 1, stage, Kind.REQUESTS].take()
        if stage < last:
            yield from channels[stage, stage + 1, Kind.REQUESTS].push(batch[0] if batch else 100)
        if iteration in plan.control:
            yield from agree(plan, stage, channels)
        if batch is not None:
            if stage > 0:
                yield from channels[stage - 1, stage, Kind.PROXY].take()
            if stage < last:
                yield from channels[stage, stage + 1, Kind.PROXY].push(batch[1])
            else:
                for other in range(last):
                    yield from channels[last, other, Kind.OUTPUT].push(batch[2])
        finished = iteration + 1 - plan.slots
        if stage < last and 0 <= finished < len(plan.batches) and plan.batches[finished] is not None:
            yield from channels[last, stage, Kind.OUTPUT].take()


def agree(plan: Plan, stage: int, channels: dict[tuple[int, int, Kind], Channel]) -> Step:
    """What became of a control request: told to all others, then heard from all others."""
    others = [other for other in range(plan.stages) if other != stage]
    for other in others:
        yield from channels[stage, other, Kind.OUTCOME].push(100)
    for other in others:
        yield from channels[other, stage, Kind.OUTCOME].take()


def stages_that_hang(plan: Plan, bounds: Bounds | None = None) -> list[int]:
    """Run all stages until none can go on; those that have not come to their end."""
    bounds = bounds or Bounds.for_loops(plan.window, plan.window_bytes, plan.slots)
    every = [(a, b, kind) for a in range(plan.stages) for b in range(plan.stages) for kind in Kind]
    channels = {name: Channel(bounds) for name in every}
    running = {stage: run_stage(plan, stage, channels) for stage in range(plan.stages)}
    before = None
    while running:
        state = [(c.window.sent_messages, c.meter.taken_messages) for c in channels.values()]
        if state == before:
            return sorted(running)
        before = state
        for stage in list(running):
            # As far as it gets: a greedy stage fills what can be filled before another one takes.
            if next(running[stage], "ended") == "ended":
                del running[stage]
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
)


@settings(max_examples=600)
@given(PLANS)
def test_no_bounds_and_no_sizes_make_the_stages_wait_for_each_other(plan: Plan) -> None:
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
