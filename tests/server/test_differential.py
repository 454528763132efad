"""The same requests to SGLang 0.5.21, unpatched and patched: equal tokens, equal log-probabilities.

The model has random weights: on it, faults at the stage boundary that leave a trained model's answers alone
change the text (field notes, section 5). While the patched server is up, its recorded order and its use of
gloo are looked at as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from sglang_npu_pp.trace import Event

from . import battery, order
from .conftest import DIGITS_MODEL, Launcher, point_to_point_counts, traces

pytestmark = pytest.mark.server

Answers = dict[str, Any]


class Layout(NamedTuple):
    """A server as it is compared with its twin."""

    name: str
    tp: int
    pp: int
    options: dict[str, Any]  # for both servers
    patched_env: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple default, never written

    @property
    def device_lane(self) -> bool:
        return self.patched_env.get("SGLANG_NPU_PP_PROXY_LANE") == "device"


def depth(value: int) -> tuple[str, str]:
    return ("--pp-async-batch-depth", str(value))


SKIP_OUTPUTS = {"SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM": "1"}
LAYOUTS = [
    Layout("tp1-pp2", 1, 2, {}),
    Layout("tp1-pp2-depth1-skip", 1, 2, {"args": depth(1), "env": SKIP_OUTPUTS}),
    Layout("tp2-pp2-two-nodes", 2, 2, {"nnodes": 2}, {"SGLANG_NPU_PP_HOST_TRANSPORT": "tcp"}),
    Layout("tp2-pp2-depth1-device-lane", 2, 2, {"args": depth(1)}, {"SGLANG_NPU_PP_PROXY_LANE": "device"}),
    Layout("tp1-pp4", 1, 4, {}, {"SGLANG_NPU_PP_CHECKSUM": "full"}),
    Layout("tp1-pp4-depth1-trained", 1, 4, {"args": depth(1), "model": DIGITS_MODEL}),
]


@dataclass
class Observed:
    """What one server answered and did."""

    one_by_one: Answers
    concurrent: Answers
    point_to_point: int  # torch.distributed sends and receives during the battery, all ranks
    traces: dict[int, list[Event]] = field(default_factory=dict)


def observe(launcher: Launcher, layout: Layout, *, patched: bool) -> Observed:
    """Start a server, run the battery one by one and sixteen at a time, stop it."""
    options = dict(layout.options)
    if patched:
        options["env"] = {**options.get("env", {}), **layout.patched_env}
    server = launcher.start(layout.tp, layout.pp, patched=patched, **options)
    try:
        before = sum(point_to_point_counts(server).values())
        (one_by_one,) = battery.run(server)
        (concurrent,) = battery.run(server, concurrency=16)
        after = sum(point_to_point_counts(server).values())
        recorded = traces(server) if patched else {}
    finally:
        launcher.stop_all()
    return Observed(one_by_one, concurrent, after - before, recorded)


@dataclass
class Pair:
    layout: Layout
    upstream: Observed
    patched: Observed

    @property
    def senders(self) -> list[list[Event]]:
        """Traces of the stages that send proxies."""
        return [self.patched.traces[stage] for stage in range(self.layout.pp - 1)]

    @property
    def receivers(self) -> list[list[Event]]:
        """Traces of the stages that receive proxies."""
        return [self.patched.traces[stage] for stage in range(1, self.layout.pp)]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: layout.name)
def pair(request: pytest.FixtureRequest, make_launcher: Callable[[str], Launcher]) -> Pair:
    layout = request.param
    upstream = observe(make_launcher("upstream"), layout, patched=False)
    return Pair(layout, upstream, observe(make_launcher("patched"), layout, patched=True))


def test_upstream_answers_do_not_depend_on_company(pair: Pair) -> None:
    """Otherwise the comparison of concurrent requests would mean nothing."""
    assert not battery.differences(pair.upstream.one_by_one, pair.upstream.concurrent)


def test_patched_answers_one_by_one_equal_upstreams(pair: Pair) -> None:
    assert not battery.differences(pair.upstream.one_by_one, pair.patched.one_by_one)


def test_sixteen_patched_answers_at_a_time_equal_upstreams(pair: Pair) -> None:
    assert not battery.differences(pair.upstream.one_by_one, pair.patched.concurrent)


def test_no_gloo_point_to_point_after_start(pair: Pair) -> None:
    """Proxies on the device lane are torch.distributed by choice; nothing else is."""
    assert pair.upstream.point_to_point > 1000, "the probe does not count"
    if pair.layout.device_lane:
        proxies = sum(event.name == "post_send" for trace in pair.senders for event in trace)
        assert pair.patched.point_to_point <= 2 * proxies * pair.layout.tp
    else:
        assert pair.patched.point_to_point == 0


def test_every_stage_launches_the_same_microbatches(pair: Pair) -> None:
    first = order.launches(pair.patched.traces[0])
    assert len(first) > 100
    for trace in pair.receivers:
        assert order.launches(trace) == first


def test_proxies_are_sent_right_behind_their_launch(pair: Pair) -> None:
    for trace in pair.senders:
        assert not order.proxies_leave_right_behind_the_launch(trace)


def test_the_wait_for_proxies_is_the_last_thing_before_the_forward(pair: Pair) -> None:
    for trace in pair.receivers:
        assert not order.proxies_are_waited_for_last(trace)


def test_tokens_are_waited_for_behind_the_launch_at_any_depth(pair: Pair) -> None:
    for trace in pair.patched.traces.values():
        assert not order.tokens_are_waited_for_behind_the_launch(trace)


def test_messages_are_there_before_they_are_asked_for(pair: Pair) -> None:
    for trace in pair.receivers:
        assert order.arrived_unasked(trace, "proxy") > 0


def test_device_receives_are_posted_as_soon_as_their_header_is_here(pair: Pair) -> None:
    for trace in pair.receivers:
        assert any(event.name == "post_receive" for event in trace) == pair.layout.device_lane
        if pair.layout.device_lane:
            assert not order.receives_are_posted_with_their_header(trace, slots=4)


def test_order_checks_can_fail() -> None:
    """The same checks on a trace in upstream's order: output processing before the proxies leave, tokens
    waited for before the launch."""
    upstream_order = [
        Event(0, "push", "requests", -1, 5),
        Event(1, "post", "output", 1, 4),
        Event(2, "wait", "output", 1, 4),
        Event(3, "ready", "output", 1, 4),
        Event(4, "launch", "", 0, 5),
        Event(5, "launched", "", 0, 5),
        Event(6, "wait", "output", 1, 4),
        Event(7, "push", "proxy", 0, 5),
    ]
    assert order.proxies_leave_right_behind_the_launch(upstream_order)
    assert order.proxies_are_waited_for_last(upstream_order)
    assert order.tokens_are_waited_for_behind_the_launch(upstream_order)
