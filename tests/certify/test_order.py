"""Checks of recorded order, on events written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify import order


def events(*names: str) -> list[Event]:
    """`"name kind iteration"`, in this order."""
    parts = [name.split() for name in names]
    return [Event(at, name, kind, 0, int(iteration)) for at, (name, kind, iteration) in enumerate(parts)]


HEADER, POST = "arrive proxy 7", "post_receive proxy 7"


@pytest.mark.parametrize("between", [[], ["push output 6"], ["run - 6", "push output 6", "ran - 6"]])
def test_a_receive_is_posted_with_its_header_whatever_other_threads_do(between: Sequence[str]) -> None:
    assert not order.receives_are_posted_with_their_header(events(HEADER, *between, POST), slots=4)


@pytest.mark.parametrize("between", ["launch - 6", "wait output 6", "push proxy 6", "arrive proxy 8"])
def test_a_receive_that_is_posted_later_is_a_complaint(between: str) -> None:
    complaint, *_ = order.receives_are_posted_with_their_header(events(HEADER, between, POST), slots=4)
    assert "iteration=7" in complaint


def test_a_receive_without_a_free_slot_may_come_later() -> None:
    late = ("post_receive proxy 6", HEADER, "launched - 6", POST)
    assert not order.receives_are_posted_with_their_header(events(*late), slots=1)


def test_proxies_are_waited_for_last_whatever_other_threads_do() -> None:
    ready, launch = "ready proxy 7", "launch - 7"
    assert not order.proxies_are_waited_for_last(events(ready, "push output 6", launch))
    assert order.proxies_are_waited_for_last(events(ready, "wait output 6", launch))


def test_outputs_leave_right_behind_their_launch_to_one_stage_after_another() -> None:
    sent = ("launched - 7", "arrive requests 8", "push output 7", "push output 7", "launched - 8")
    assert not order.outputs_leave_right_behind_the_launch(events(*sent))


@pytest.mark.parametrize("before", ["iteration - 8", "ready requests 8", "launched - 8"])
def test_outputs_that_leave_later_are_a_complaint(before: str) -> None:
    (complaint,) = order.outputs_leave_right_behind_the_launch(
        events("launched - 7", before, "push output 7")
    )
    assert "iteration 7" in complaint
