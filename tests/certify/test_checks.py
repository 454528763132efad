"""Every kind of difference turns its check red, and none is passed by asking nothing."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify.battery import Run
from sglang_npu_pp.tools.certify.checks import (
    ABORTS,
    ALIVE,
    FORWARDS,
    IN_FORCE,
    LOST_PEER,
    MICROBATCHES,
    ONE_BY_ONE,
    OUTPUTS,
    PROXIES_SENT,
    PROXIES_WAITED_FOR,
    RECEIVES,
    TOGETHER,
    TOKENS_WAITED_FOR,
    checks,
    may_be_certified,
)
from sglang_npu_pp.tools.certify.examine import Observed, announcements
from sglang_npu_pp.tools.certify.results import Check, Verdict

from .samples import CASES, ITERATIONS, answer, first_stage, last_stage, patched, run, traces, unpatched

DEVICE_ONLY = {RECEIVES, FORWARDS}


def verdicts(*observed: Observed) -> dict[str, Verdict]:
    return {check.name: check.verdict for check in checks(observed)}


def red(*observed: Observed) -> set[str]:
    return {name for name, verdict in verdicts(*observed).items() if verdict is Verdict.FAILED}


def named(name: str, *observed: Observed) -> Check:
    return next(check for check in checks(observed) if check.name == name)


def with_trace(stage: int, trace: list[Event]) -> dict[str, Any]:
    return {"traces": {"rank 0": {**traces(), stage: trace}}}


def swapped(trace: list[Event], first: tuple[str, str], second: tuple[str, str]) -> list[Event]:
    """Two events exchanged in the iteration in the middle."""
    found = {
        (event.name, event.kind): n for n, event in enumerate(trace) if event.iteration == ITERATIONS // 2
    }
    left, right = found[first], found[second]
    changed = list(trace)
    changed[left], changed[right] = changed[right], changed[left]
    return changed


def without(trace: list[Event], name: str, kind: str, iteration: int) -> list[Event]:
    return [event for event in trace if (event.name, event.kind, event.iteration) != (name, kind, iteration)]


def test_two_servers_that_are_alike_pass_and_may_be_certified() -> None:
    found = verdicts(unpatched(), patched())
    assert {name for name, verdict in found.items() if verdict is not Verdict.PASSED} == DEVICE_ONLY
    assert {found[name] for name in DEVICE_ONLY} == {Verdict.LEFT_OUT}
    assert may_be_certified(checks([unpatched(), patched()]))


def test_two_rounds_are_judged_together() -> None:
    second = {"round": 2, "one_by_one": [run(text=answer(9))]}
    assert red(unpatched(), patched(), unpatched(round=2), patched(**second)) == {ONE_BY_ONE}


FIRST, LAST = first_stage(range(ITERATIONS)), last_stage(range(ITERATIONS))
OTHER = run(length_7=answer(9))
NO_ANSWER = Run({name: answer() for name in CASES[1:]}, {"length 1": "HTTP 500: no"})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"one_by_one": [run(), OTHER]}, {ONE_BY_ONE}),
        ({"one_by_one": [NO_ANSWER]}, {ONE_BY_ONE}),
        ({"concurrent": OTHER}, {TOGETHER}),
        ({"concurrent": NO_ANSWER}, {TOGETHER}),
        ({"in_force": ["stage 0 rank 0"], "traces": {}}, {IN_FORCE}),
        ({"ended": "no answer came within 5 s"}, {ALIVE}),
        ({"abort_problems": ["the server is not idle after 60 s"]}, {ABORTS}),
        ({"after_aborts": OTHER}, {ABORTS}),
        ({"lost_peer_problems": ["process 7 is still there after 60 s"]}, {LOST_PEER}),
        (with_trace(1, LAST[: -9 * 5]), {MICROBATCHES, OUTPUTS}),
        (with_trace(0, swapped(FIRST, ("push", "proxy"), ("post", "output"))), {PROXIES_SENT}),
        (with_trace(1, swapped(LAST, ("ready", "proxy"), ("launch", ""))), {PROXIES_WAITED_FOR}),
        (with_trace(0, swapped(FIRST, ("wait", "output"), ("launch", ""))), {TOKENS_WAITED_FOR}),
        (with_trace(0, without(FIRST, "ready", "output", 7)), {OUTPUTS}),
        (with_trace(1, [*LAST, Event(0, "ready", "output", 0, 9)]), {OUTPUTS}),
        (
            with_trace(
                1, [*LAST, Event(0, "arrive", "proxy", 0, 9), Event(0, "post_receive", "proxy", 0, 8)]
            ),
            {RECEIVES},
        ),
        (with_trace(1, [*LAST, Event(0, "run", "", 0, 9), Event(0, "ran", "", 0, 9)]), {FORWARDS}),
    ],
)
def test_each_kind_of_difference_turns_its_check_red(change: dict[str, Any], expected: set[str]) -> None:
    assert red(unpatched(), patched(**change)) == expected
    assert not may_be_certified(checks([unpatched(), patched(**change)]))


def proxies_last(trace: list[Event]) -> list[Event]:
    """Proxies leave at the end of each iteration."""
    changed: list[Event] = []
    late: list[Event] = []
    for event in trace:
        if event.name == "iteration":
            changed, late = [*changed, *late], []
        (late if (event.name, event.kind) == ("push", "proxy") else changed).append(event)
    return [*changed, *late]


@pytest.mark.parametrize(("early_send", "expected"), [(True, {PROXIES_SENT}), (False, set())])
def test_the_order_is_that_of_the_switches(early_send: bool, expected: set[str]) -> None:
    late = with_trace(0, proxies_last(FIRST))
    assert red(unpatched(), patched(early_send=early_send, **late)) == expected
    usual = red(unpatched(), patched(early_send=early_send))
    assert usual == ({PROXIES_SENT} - expected if not early_send else set())


def test_a_receive_is_posted_in_its_wait_with_the_switch_off() -> None:
    in_wait = [Event(0, "wait", "proxy", 0, 9), Event(0, "post_receive", "proxy", 0, 9)]
    early = with_trace(1, [*LAST, Event(0, "arrive", "proxy", 0, 9), in_wait[1]])
    assert red(unpatched(), patched(early_receive=False, **early)) == {RECEIVES}
    found = verdicts(unpatched(), patched(early_receive=False, **with_trace(1, [*LAST, *in_wait])))
    assert found[RECEIVES] is Verdict.PASSED


def test_an_unpatched_server_that_is_patched_is_no_reference() -> None:
    assert red(unpatched(in_force=["stage 0 rank 0"]), patched()) == {IN_FORCE}


def test_a_trace_of_every_scheduler_shows_that_they_are_patched() -> None:
    """A log level above info hides what they say."""
    assert verdicts(unpatched(), patched(in_force=[]))[IN_FORCE] is Verdict.PASSED


def test_what_the_unpatched_server_refuses_is_left_out_with_its_reason() -> None:
    reference = unpatched(one_by_one=[NO_ANSWER], concurrent=NO_ANSWER)
    found = patched(one_by_one=[NO_ANSWER], concurrent=NO_ANSWER, after_aborts=NO_ANSWER)
    assert red(reference, found) == set()
    check = named(ONE_BY_ONE, reference, found)
    assert check.text == "3 cases were compared exactly."
    assert "not compared, length 1: refused, HTTP 500: no" in check.details


def test_what_only_the_patched_server_refuses_is_named() -> None:
    check = named(ONE_BY_ONE, unpatched(), patched(one_by_one=[NO_ANSWER]))
    assert "length 1: the patched server has not answered it" in check.details
    assert "patched, length 1: HTTP 500: no" in check.details


def test_a_patched_server_that_does_not_repeat_itself_where_the_other_does_is_red() -> None:
    assert red(unpatched(), patched(one_by_one=[run(), run(stream=answer(8))])) == {ONE_BY_ONE}


def test_an_unpatched_server_that_does_not_repeat_itself_leaves_the_check_out() -> None:
    """It is never passed with nothing left to compare, and there is no certificate."""
    other = Run({name: answer(7) for name in CASES})
    reference = unpatched(one_by_one=[run(), other], concurrent=other)
    found = verdicts(reference, patched())
    assert found[ONE_BY_ONE] is found[TOGETHER] is found[ABORTS] is Verdict.LEFT_OUT
    assert not may_be_certified(checks([reference, patched()]))


def test_an_unpatched_server_that_differs_in_company_is_compared_alone() -> None:
    reference = unpatched(concurrent=Run({name: answer(7) for name in CASES}))
    found = verdicts(reference, patched())
    assert found[ONE_BY_ONE] is Verdict.PASSED
    assert found[TOGETHER] is Verdict.LEFT_OUT
    assert may_be_certified(checks([reference, patched()]))


def test_a_case_that_does_not_repeat_is_not_counted() -> None:
    check = named(ONE_BY_ONE, unpatched(one_by_one=[run(), run(text=answer(8))]), patched())
    assert check.verdict is Verdict.PASSED
    assert check.text == "3 cases were compared exactly, 1 could not be compared."


EVERYTHING = {check.name for check in checks([])}
NO_CASES = {"asked": (), "asked_together": (), "one_by_one": [Run()], "concurrent": Run()}
FEW = {0: first_stage(range(3)), 1: last_stage(range(3))}
ORDER = {MICROBATCHES, PROXIES_SENT, PROXIES_WAITED_FOR, TOKENS_WAITED_FOR, OUTPUTS}


@pytest.mark.parametrize(
    ("observed", "not_passed"),
    [
        ((), EVERYTHING),
        ((unpatched(),), EVERYTHING),
        ((patched(),), {ALIVE, ONE_BY_ONE, TOGETHER, ABORTS}),
        ((unpatched(), patched(one_by_one=[], concurrent=None)), {ONE_BY_ONE, TOGETHER}),
        ((unpatched(**NO_CASES), patched(**NO_CASES, after_aborts=Run())), {ONE_BY_ONE, TOGETHER, ABORTS}),
        ((unpatched(), patched(traces={"rank 0": {}})), ORDER),
        ((unpatched(), patched(traces={"rank 0": {0: [], 1: []}})), ORDER),
        ((unpatched(), patched(traces={"rank 0": FEW})), {MICROBATCHES}),
    ],
    ids=[
        "nothing",
        "one side",
        "the other",
        "not asked",
        "no cases",
        "no traces",
        "no events",
        "few launches",
    ],
)
def test_nothing_is_passed_or_certified_that_was_not_seen(
    observed: tuple[Observed, ...], not_passed: set[str]
) -> None:
    found = checks(observed)
    assert not may_be_certified(found)
    assert not not_passed & {check.name for check in found if check.verdict is Verdict.PASSED}


def test_missing_traces_leave_the_order_out() -> None:
    found = verdicts(unpatched(), patched(traces={}, no_traces="the server is not idle after 60 s"))
    assert {found[name] for name in (MICROBATCHES, PROXIES_SENT, PROXIES_WAITED_FOR, OUTPUTS)} == {
        Verdict.LEFT_OUT
    }


def test_a_full_buffer_has_forgotten_another_begin_on_each_stage() -> None:
    """Compared is what all stages have, from the begin of an iteration on."""
    cut = {0: FIRST[9 * 4 + 5 :], 1: LAST[9 * 3 + 7 :]}
    found = verdicts(unpatched(), patched(traces={"rank 0": cut}))
    assert {name for name, verdict in found.items() if verdict is not Verdict.PASSED} == DEVICE_ONLY


def test_the_stages_of_one_node_of_several_are_looked_at_alone() -> None:
    found = verdicts(
        unpatched(), patched(traces={"rank 0": {0: FIRST}}, schedulers=1, in_force=["stage 0 rank 0"])
    )
    assert found[PROXIES_SENT] is Verdict.PASSED
    assert found[MICROBATCHES] is found[OUTPUTS] is Verdict.LEFT_OUT


def test_what_schedulers_say_is_found_in_the_log() -> None:
    begin = "sglang-npu-pp: 40 patches in force for SGLang"
    log = (
        f"[PP1] {begin} 0.5.21, all features; stage 1 rank 0 of 2 stages, proxies on the host lane\n"
        f"[PP0] {begin} 0.5.24.dev7+gabc (functions of 0.5.23), not for LoRA (x differs); stage 0 rank 0 of "
        "2 stages, proxies on the host lane\n"
        f"{begin} 0.5.21, all features\n"
    )
    assert announcements(log) == ["stage 0 rank 0", "stage 1 rank 0"]
