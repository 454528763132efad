"""certify's examination of real servers: green for two that are alike, red for every planted fault.

One patched server gets every silent fault in turn, from empty caches; those that end it get servers of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import pytest

from rig.faults import AGAIN, Faults
from rig.launcher import Launcher
from rig.probes import sglang_pp_faults as boundary
from rig.probes import sglang_pp_order_faults as order
from sglang_npu_pp.tools.certify.battery import choose
from sglang_npu_pp.tools.certify.checks import (
    ABORTS,
    ALIVE,
    FORWARDS,
    LOST_PEER,
    ONE_BY_ONE,
    PROXIES_SENT,
    RECEIVES,
    TOGETHER,
    TOKENS_WAITED_FOR,
    checks,
    may_be_certified,
)
from sglang_npu_pp.tools.certify.examine import Examination, Observed, observe
from sglang_npu_pp.tools.certify.launch import LaunchedServer
from sglang_npu_pp.tools.certify.lost_peer import lose_peer
from sglang_npu_pp.tools.certify.results import Check, Side, Verdict
from sglang_npu_pp.tools.certify.served import ask_served

pytestmark = pytest.mark.release

NONE = boundary.NONE
SILENT = (*order.SILENT, boundary.HALF_COPIED, *boundary.FAULTS)
ROUNDS = (NONE, *SILENT, f"{NONE}{AGAIN}")
ANSWER_LIMIT_S = 120.0
END_LIMIT_S = 60.0
WAIT_LIMIT_S = "30"  # of a stage for a message: a lost one ends the server
FEW = (  # cases by which faults are looked for: in each, some of the kinds that differ at a stage boundary
    *(f"length {length}" for length in (1, 64, 257, 1024)),
    *(f"shared prefix {number}" for number in range(4)),
    *("many tokens", "stream", "picture 64 x 64"),
)
ONLY_BY_ORDER = {order.SENT_LATE: PROXIES_SENT, order.WAITED_EARLY: TOKENS_WAITED_FOR}
DEVICE_ONLY = {RECEIVES, FORWARDS}


@dataclass(frozen=True)
class Played:
    """What the checks said while a fault was in force, and how often it struck."""

    checks: Sequence[Check]
    struck: int

    @property
    def red(self) -> set[str]:
        return {check.name for check in self.checks if check.verdict is Verdict.FAILED}

    def named(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)


def launched(launcher: Launcher, side: Side, faults: Faults | None = None) -> LaunchedServer:
    """As a user would start it, in the environment in which SGLang serves here."""
    env = {**faults.variables, "SGLANG_NPU_PP_WAIT_LIMIT_S": WAIT_LIMIT_S} if faults else {}
    server = launcher.configure(1, 2, patched=side is Side.PATCHED, env=env)
    return LaunchedServer(server.command()[3:], server.log.parent, environment=server.environment)


@pytest.fixture(scope="module")
def launcher(make_launcher: Callable[[str], Launcher]) -> Launcher:
    return make_launcher("certify")


@pytest.fixture(scope="module")
def examined(launcher: Launcher) -> tuple[Observed, Examination]:
    """The unpatched server, twice one by one, and what is asked of the patched one."""
    with launched(launcher, Side.UNPATCHED) as server:
        served = ask_served(server)
        examination = Examination(served, choose(served), limit_s=ANSWER_LIMIT_S)
        found = observe(server, Side.UNPATCHED, 1, examination, times=2)
    return found, examination.without(found.refused)


@pytest.fixture(scope="module")
def played(launcher: Launcher, examined: tuple[Observed, Examination]) -> Mapping[str, Played]:
    """All silent faults, on one server; at its end a scheduler is killed."""
    unpatched, examination = examined
    faults = Faults(launcher.directory / "fault")
    rounds = {}
    with launched(launcher, Side.PATCHED, faults) as server:
        for fault in ROUNDS:
            faults.arm(fault)
            if fault == ROUNDS[0]:
                found = observe(server, Side.PATCHED, 1, examination, aborts=True)
            else:
                found = observe(server, Side.PATCHED, 1, shorter(examination))
            if fault == ROUNDS[-1]:
                problems = lose_peer(server, examination.served, END_LIMIT_S)
                found = replace(found, lost_peer_problems=problems)
            rounds[fault] = Played(judged(unpatched, found), faults.struck)
    return rounds


def shorter(examination: Examination) -> Examination:
    others = set(examination.battery.names) - set(FEW)
    return examination.without(dict.fromkeys(others, "left out by choice"))


def judged(unpatched: Observed, found: Observed) -> list[Check]:
    """By what both were asked."""
    asked = replace(unpatched, asked=found.asked, asked_together=found.asked_together)
    return checks([asked, found])


def test_the_unpatched_server_repeats_itself_and_refuses_nothing(
    examined: tuple[Observed, Examination],
) -> None:
    found, examination = examined
    assert not found.ended
    assert not found.refused
    assert examination.battery.left_out == {}
    first, second = found.one_by_one
    assert first.answers == second.answers
    assert set(first.answers) == set(examination.battery.names)


@pytest.mark.parametrize("fault", [ROUNDS[0], ROUNDS[-1]])
def test_two_servers_that_are_alike_pass_everything(played: Mapping[str, Played], fault: str) -> None:
    found = played[fault]
    left_out = DEVICE_ONLY | ({LOST_PEER} if fault == ROUNDS[0] else {ABORTS})
    assert {check.name for check in found.checks if check.verdict is not Verdict.PASSED} == left_out, found
    assert may_be_certified(found.checks)
    assert found.named(ONE_BY_ONE).text.endswith("cases were compared exactly.")


@pytest.mark.parametrize("fault", SILENT)
def test_a_silent_fault_turns_certify_red(played: Mapping[str, Played], fault: str) -> None:
    found = played[fault]
    assert found.struck > 0, "the fault never took effect"
    assert ALIVE not in found.red, found
    assert not may_be_certified(found.checks)
    expected = {ONLY_BY_ORDER[fault]} if fault in ONLY_BY_ORDER else {ONE_BY_ONE, TOGETHER}
    assert found.red & expected, found
    if fault in ONLY_BY_ORDER:
        assert not found.red & {ONE_BY_ONE, TOGETHER}, "it was to be seen by the order alone"


@pytest.fixture
def fragile(launcher: Launcher) -> Iterator[tuple[LaunchedServer, Faults]]:
    faults = Faults(launcher.directory / "ending")
    with ExitStack() as stack:
        yield stack.enter_context(launched(launcher, Side.PATCHED, faults)), faults


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (order.DROPPED, "WaitLimitError: stage "),  # of either: stage 1 then waits for stage 0
        (order.SENT_TWICE, "SequenceError: stage 0 rank 0: "),
    ],
)
def test_a_fault_that_ends_the_server_is_a_red_check_with_its_sentence(
    examined: tuple[Observed, Examination],
    fragile: tuple[LaunchedServer, Faults],
    fault: str,
    sentence: str,
) -> None:
    """Not a traceback of certify."""
    unpatched, examination = examined
    server, faults = fragile
    faults.arm(fault)
    found = observe(server, Side.PATCHED, 1, shorter(examination))
    assert faults.struck == 1
    played = Played(judged(unpatched, found), faults.struck)
    assert ALIVE in played.red
    assert sentence in played.named(ALIVE).details[0]
    assert not may_be_certified(played.checks)
