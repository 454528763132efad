"""The same requests to SGLang 0.5.21, unpatched and patched: equal tokens, equal log-probabilities.

The model has random weights: on it, faults at the stage boundary that leave a trained model's answers alone
change the text (field notes, section 5). While the patched server is up, its recorded order and its use of
gloo are looked at as well.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from rig import comparison
from rig.comparison import CHECKS, SWITCHES_OFF, Layout, Observed, Pair, depth
from rig.launcher import Launcher
from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify import order
from tests.field_cases import field_case
from tests.upstream_cases import upstream_case

SKIP_OUTPUTS = {"SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM": "1"}
LAYOUTS = [
    Layout("tp1-pp2", 1, 2),
    Layout(
        "tp2-pp2-two-nodes",
        2,
        2,
        {"nnodes": 2},
        {"SGLANG_NPU_PP_HOST_TRANSPORT": "tcp", "SGLANG_NPU_PP_AHEAD": "1"},
    ),
    Layout(
        "tp2-pp2-depth1-skip-device-lane",
        2,
        2,
        {"args": depth(1), "env": SKIP_OUTPUTS},
        {"SGLANG_NPU_PP_PROXY_LANE": "device"},
    ),
    Layout("tp1-pp4", 1, 4, {}, {"SGLANG_NPU_PP_CHECKSUM": "full"}),
    Layout("tp1-pp2-switches-off", 1, 2, {}, {**SWITCHES_OFF, "SGLANG_NPU_PP_PROXY_LANE": "device"}),
    Layout("tp1-pp4-depth1-late-send", 1, 4, {"args": depth(1)}, {"SGLANG_NPU_PP_EARLY_SEND": "0"}),
]


def marks_of(layout: Layout) -> list[pytest.MarkDecorator]:
    """Four stages are run by `make matrix`, too; depth 1 by tests/server/test_depth.py."""
    if layout is LAYOUTS[0]:
        return []
    return [pytest.mark.thorough if layout is LAYOUTS[1] else pytest.mark.release]


@pytest.fixture(scope="module")
def upstream_answers() -> dict[tuple[int, int], Observed]:
    """By tp and pp size, which alone decide how numbers are added up: neither the depth nor where the
    processes run changes an answer that does not depend on company."""
    return {}


@pytest.fixture(
    scope="module",
    params=[pytest.param(layout, id=layout.name, marks=marks_of(layout)) for layout in LAYOUTS],
)
def pair(
    request: pytest.FixtureRequest,
    make_launcher: Callable[[str], Launcher],
    upstream_answers: dict[tuple[int, int], Observed],
) -> Pair:
    layout: Layout = request.param
    known = upstream_answers.get((layout.tp, layout.pp))
    found = comparison.compare(make_launcher("differential"), layout, upstream=known)
    upstream_answers[layout.tp, layout.pp] = found.upstream
    return found


@upstream_case(
    "TestPPAccuracy.test_gsm8k", "TestQwenVLPPAccuracy.test_gsm8k", "TestQwenVLPPAccuracy.test_mmmu"
)
@field_case("sglang-15545")  # depth 1 among the layouts; depth 2 in regression/
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_nothing_is_wrong(pair: Pair, check: Callable[[Pair], list[str]]) -> None:
    assert not check(pair)


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


def test_checks_of_the_order_with_a_switch_off_can_fail() -> None:
    """Each on its own order and on the usual one, which must not pass for it."""
    begin, end = Event(0, "iteration", "", 0, 5), Event(9, "iteration", "", 1, 6)
    launch, launched = Event(1, "launch", "", 0, 5), Event(2, "launched", "", 0, 5)
    outputs = [Event(4, "wait", "output", 1, 4), Event(5, "ready", "output", 1, 4)]
    push, send = Event(6, "push", "proxy", 0, 5), Event(7, "post_send", "proxy", 0, 5)
    late = [begin, launch, launched, *outputs, push, send, end]
    assert not order.proxies_leave_at_the_end_of_the_iteration(late)
    assert order.proxies_leave_right_behind_the_launch(late)
    early = [begin, launch, launched, push, send, *outputs, end]
    assert order.proxies_leave_at_the_end_of_the_iteration(early)
    assert order.proxies_leave_at_the_end_of_the_iteration([begin, launch, launched, push, send, end])

    header, posted = Event(1, "arrive", "proxy", 0, 5), Event(4, "post_receive", "proxy", 0, 5)
    wait, ready = Event(3, "wait", "proxy", 0, 5), Event(5, "ready", "proxy", 0, 5)
    assert not order.receives_are_posted_in_their_wait([header, wait, posted, ready])
    assert not order.receives_are_posted_in_their_wait([wait, header, posted, ready])
    assert order.receives_are_posted_with_their_header([header, wait, posted, ready], slots=4)
    assert order.receives_are_posted_in_their_wait([header, posted, wait, ready])
    another = Event(2, "wait", "requests", -1, 6)
    assert order.receives_are_posted_in_their_wait([another, header, posted, wait, ready])


@field_case("vllm-40749", "vllm-ascend-4973")
def test_checks_of_outputs_can_fail() -> None:
    """How it should be, a last stage that asks for what it made itself, a first one that gets nothing."""
    sent = Event(1, "push", "output", 0, 7)
    asked, received = Event(2, "post", "output", 0, 7), Event(3, "ready", "output", 0, 7)
    assert not order.outputs_come_from_the_last_stage({0: [asked, received], 1: [sent]})
    assert order.outputs_come_from_the_last_stage({0: [asked, received], 1: [sent, asked]})
    assert order.outputs_come_from_the_last_stage({0: [], 1: [sent]})


def test_checks_of_forwards_on_a_device_can_fail() -> None:
    launches = [Event(time, "launch", "", 0, iteration) for time, iteration in ((1, 5), (2, 6))]
    first, second = [
        [Event(begin, "run", "", 0, iteration), Event(end, "ran", "", 0, iteration)]
        for begin, end, iteration in ((3, 5, 5), (5, 8, 6))
    ]
    assert not order.forwards_ran_one_after_another([*launches, *first, *second])
    assert not order.forwards_ran_one_after_another([*launches, *first])  # the last ones may still run
    early = Event(0, "run", "", 0, 5)
    for wrong in ([*second, *first], second, [early, *first[1:]], [*first, *second, *second]):
        assert order.forwards_ran_one_after_another([*launches, *wrong])
