"""What sender and receiver of one channel agree on: bounded, and never stuck."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_npu_pp.transport.window import Bounds, CreditMeter, Window

MESSAGES = 8
NBYTES = 100

sizes = st.one_of(st.integers(0, 12), st.integers(0, 2 * NBYTES), st.just(NBYTES))


class Channel:
    """A window and a meter, the messages between them and the credit that is on its way back."""

    def __init__(self, messages: int, nbytes: int, slots: int = 1) -> None:
        self.bounds = Bounds.for_loops(messages, nbytes, slots)
        self.window = Window(self.bounds)
        self.meter = CreditMeter(self.bounds)
        self.in_flight: deque[int] = deque()
        self.credit: deque[tuple[int, int]] = deque()

    def try_send(self, nbytes: int) -> bool:
        if not self.window.has_room(nbytes):
            return False
        self.window.sent(nbytes)
        self.in_flight.append(nbytes)
        return True

    def take(self) -> None:
        if self.meter.take(self.in_flight.popleft()):
            self.credit.append((self.meter.reported_messages, self.meter.reported_bytes))

    def deliver_credit(self) -> None:
        self.window.credit(*self.credit.popleft())

    def settle(self) -> None:
        """The receiver takes everything and all credit comes back."""
        while self.in_flight:
            self.take()
        while self.credit:
            self.deliver_credit()


@given(
    messages=st.integers(1, 12),
    nbytes=st.integers(1, 200),
    steps=st.lists(st.one_of(sizes, st.sampled_from(["take", "credit"])), max_size=60),
)
@settings(max_examples=300)
def test_a_sender_never_exceeds_its_window_and_never_starves(
    messages: int, nbytes: int, steps: list[int | str]
) -> None:
    channel = Channel(messages, nbytes)
    for step in steps:
        if step == "take":
            if channel.in_flight:
                channel.take()
        elif step == "credit":
            if channel.credit:
                channel.deliver_credit()
        else:
            assert isinstance(step, int)
            before = sum(channel.in_flight)
            if channel.try_send(step):
                assert len(channel.in_flight) <= messages
                # Past the limit in bytes only for a message on top of what may merely be unreported.
                assert before + step <= nbytes or before == 0 or before < nbytes / 4
            else:
                channel.settle()
                assert channel.try_send(step), "everything was taken, yet the sender has no room"


@given(st.lists(sizes, max_size=40))
def test_when_everything_was_taken_any_message_may_go(taken: list[int]) -> None:
    channel = Channel(MESSAGES, NBYTES)
    for nbytes in taken:
        if not channel.try_send(nbytes):
            channel.settle()
            assert channel.try_send(nbytes)
    channel.settle()
    assert channel.window.has_room(10 * NBYTES)


def test_the_window_counts_messages() -> None:
    channel = Channel(4, 1 << 20)
    assert [channel.try_send(1) for _ in range(6)] == [True] * 4 + [False] * 2
    channel.take()
    channel.deliver_credit()  # a quarter of four
    assert [channel.try_send(1) for _ in range(2)] == [True, False]


def test_the_window_counts_bytes() -> None:
    channel = Channel(64, 100)
    assert [channel.try_send(size) for size in (60, 41, 40, 1)] == [True, False, True, False]


def test_a_message_larger_than_the_window_goes_alone() -> None:
    channel = Channel(4, 100)
    assert channel.try_send(1000)
    assert not channel.try_send(1)
    channel.settle()
    assert channel.try_send(1)


def test_credit_comes_every_quarter_of_the_window() -> None:
    meter = CreditMeter(Bounds(16, 1 << 20))
    assert [meter.take(1) for _ in range(8)] == [False, False, False, True] * 2
    by_bytes = CreditMeter(Bounds(16, 100))
    assert [by_bytes.take(size) for size in (24, 1, 24, 100)] == [False, True, False, True]


@pytest.mark.parametrize("credit", [[(3, 30), (3, 30)], [(3, 30), (2, 20)]])
def test_late_and_repeated_credit_changes_nothing(credit: list[tuple[int, int]]) -> None:
    window = Window(Bounds(4, 40))
    for _ in range(4):
        window.sent(10)
    for messages, nbytes in credit:
        window.credit(messages, nbytes)
    assert (window.taken_messages, window.taken_bytes) == (3, 30)
