"""What tests of speculative decoding compare turns red for every fault planted in what returns of a draft,
and in the order of messages.

One patched server gets each silent fault in turn, from empty caches; those that end it get servers of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import requests

from rig import battery
from rig.faults import AGAIN, Faults
from rig.launcher import Launcher, traces
from rig.probes import sglang_pp_feature_faults as features
from rig.probes.sglang_pp_faults import NONE
from rig.probes.sglang_pp_order_faults import SENT_LATE
from rig.server import Server
from rig.speculation import CONCURRENCY, Answers, Models, ask_all, essence
from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify import order

pytestmark = pytest.mark.release

STAGES = 2
END_LIMIT_S = 60.0
WAIT_LIMIT_S = "30"  # of a stage for a message
ONLY_BY_ORDER = {
    features.OUTPUTS_LATE: "outputs sent",
    features.OUTPUTS_EARLY: "outputs waited for",
    SENT_LATE: "proxies sent",
}
SILENT = (*features.SILENT_DRAFTS, *ONLY_BY_ORDER)
ROUNDS = (NONE, *SILENT, f"{NONE}{AGAIN}")


@dataclass(frozen=True)
class Played:
    """What comparisons said while a fault was in force, and how often it struck."""

    answers: Sequence[str]  # differences
    order: Mapping[str, Sequence[str]]  # complaints, by rule
    struck: int


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models.written(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def launcher(make_launcher: Callable[[str], Launcher]) -> Iterator[Launcher]:
    launcher = make_launcher("speculation-faults")
    yield launcher
    launcher.stop_all()


def started(launcher: Launcher, models: Models, faults: Faults) -> Server:
    env = {**faults.variables, "SGLANG_NPU_PP_WAIT_LIMIT_S": WAIT_LIMIT_S}
    return launcher.servers.enter_context(models.configure(launcher, STAGES, patched=True, env=env))


@pytest.fixture(scope="module")
def expected(launcher: Launcher, models: Models) -> Answers:
    """Of a server without the patches."""
    with models.configure(launcher, STAGES, patched=False) as server:
        return essence(ask_all(server, CONCURRENCY))


@pytest.fixture(scope="module")
def played(launcher: Launcher, models: Models, expected: Answers) -> Mapping[str, Played]:
    faults = Faults(launcher.directory / "fault")
    server = started(launcher, models, faults)
    rounds = {}
    for fault in ROUNDS:
        assert server.post("/flush_cache").ok
        since = {stage: last_launch(trace) for stage, trace in traces(server).items()}
        faults.arm(fault)
        answers = essence(ask_all(server, CONCURRENCY))
        recorded = {
            stage: [event for event in trace if event.iteration > since[stage]]
            for stage, trace in traces(server).items()
        }
        rounds[fault] = Played(battery.differences(expected, answers), judged(recorded), faults.struck)
    return rounds


def last_launch(trace: Sequence[Event]) -> int:
    return max(order.launches(trace), default=-1)


def judged(recorded: Mapping[int, Sequence[Event]]) -> dict[str, list[str]]:
    """By the rules of `test_speculation.test_outputs_leave_behind_the_launch...`."""
    first, last = recorded[0], recorded[STAGES - 1]
    return {
        "outputs received": order.outputs_come_from_the_last_stage(recorded),
        "outputs sent": order.outputs_leave_right_behind_the_launch(last),
        "outputs waited for": order.tokens_are_waited_for_behind_the_launch(first),
        "proxies sent": order.proxies_leave_right_behind_the_launch(first),
    }


@pytest.mark.parametrize("fault", [ROUNDS[0], ROUNDS[-1]])
def test_without_a_fault_nothing_is_red(played: Mapping[str, Played], fault: str) -> None:
    found = played[fault]
    assert not found.answers
    assert not any(found.order.values()), found.order
    assert not found.struck


@pytest.mark.parametrize("fault", SILENT)
def test_a_silent_fault_turns_a_comparison_red(played: Mapping[str, Played], fault: str) -> None:
    found = played[fault]
    red = [rule for rule, complaints in found.order.items() if complaints]
    print(f"{fault}: {found.struck} strikes, {len(found.answers)} differences, {red}")
    assert found.struck > 0, "the fault never took effect"
    if fault in ONLY_BY_ORDER:
        assert not found.answers, "it was to be seen by the order alone"
        assert red == [ONLY_BY_ORDER[fault]]
    else:
        assert found.answers
        assert not red


@pytest.mark.parametrize("fault", features.ENDING_DRAFTS)
def test_stages_that_accept_unequally_end_with_a_sentence(
    launcher: Launcher, models: Models, fault: str
) -> None:
    """The next microbatch in which other requests are left: no wrong answer is given as a right one."""
    faults = Faults(launcher.directory / fault.replace(" ", "-"))
    server = started(launcher, models, faults)
    ask_all(server, CONCURRENCY)
    faults.arm(fault)
    with pytest.raises(requests.ConnectionError):
        ask_all(server, CONCURRENCY)
    server.wait_end(END_LIMIT_S)
    assert faults.struck > 0
    assert "the stages decided differently which requests to run" in server.log_text()
