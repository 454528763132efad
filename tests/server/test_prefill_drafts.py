"""A prefill server of two stages that drafts with a NEXTN layer, and a decode server behind it.

The published command lines of GLM-5.2 do so. On CPU, a tiny twin of their models (rig/published_twin.py) over
Mooncake's TCP: the last stage drafts, and what a decode server needs of it returns to every stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from rig import battery, disaggregated, prefill_drafts
from rig.faults import Faults
from rig.launcher import RANDOM_MODEL, Launcher, take_cpu_compat, traces
from rig.probes.sglang_pp_faults import NONE
from rig.probes.sglang_pp_feature_faults import SILENT_PROPOSALS
from rig.published_twin import write_twin
from rig.server import Server
from sglang_npu_pp.tools.certify import order
from sglang_npu_pp.tools.certify.ports import free_ports

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        disaggregated.engine_missing() is not None, reason=str(disaggregated.engine_missing())
    ),
]

STAGES, CONCURRENCY, TOKENS = 2, 6, 16
LENGTHS = (1, 5, 17, 60, 250, 256, 257, 600)  # tokens; chunks are 256
ACCEPTANCE = ("spec_verify_ct", "spec_accept_length")

Answers = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def twin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_twin(tmp_path_factory.mktemp("twin") / "model", RANDOM_MODEL)


def configured(launcher: Launcher, stages: int, twin: Path, **options: Any) -> Server:
    server = launcher.configure(1, stages, model=twin, **options)
    take_cpu_compat(server)
    return server


def start_pair(
    launcher: Launcher, twin: Path, *, patched: bool, faults: Faults | None = None
) -> disaggregated.Pair:
    (bootstrap_port,) = free_ports(1)
    servers = [
        configured(
            launcher,
            stages,
            twin,
            patched=patched and stages > 1,
            args=prefill_drafts.arguments(mode, bootstrap_port),
            env={**prefill_drafts.environment("sglang_pp_probe"), **(faults.variables if faults else {})},
        )
        for mode, stages in (("prefill", STAGES), ("decode", 1))
    ]
    return disaggregated.start_pair(launcher.servers.enter_context, servers, bootstrap_port)


def requests() -> dict[str, dict[str, Any]]:
    return {
        f"{length} tokens, {seed}": {
            "input_ids": battery.prompt(length, seed),
            "sampling_params": {"temperature": 0, "ignore_eos": True, "max_new_tokens": TOKENS},
            "return_logprob": True,
        }
        for seed in range(2)
        for length in LENGTHS
    }


def ask_all(pair: disaggregated.Pair, concurrency: int) -> Answers:
    answers = pair.generate_all(list(requests().values()), concurrency=concurrency)
    for answer in answers:
        assert not isinstance(answer, Exception), answer
    return dict(zip(requests(), answers, strict=True))


def tokens(answers: Answers) -> dict[str, list[int]]:
    return {name: answer["output_ids"] for name, answer in answers.items()}


def essence(answers: Answers) -> dict[str, list[Any]]:
    return {
        name: [answer["output_ids"], *(answer["meta_info"][key] for key in ACCEPTANCE)]
        for name, answer in answers.items()
    }


@pytest.fixture(scope="module")
def without_drafts(make_launcher: Callable[[str], Launcher], twin: Path) -> dict[str, list[int]]:
    """Of one unpatched server with one stage."""
    with configured(
        make_launcher("no-drafts"), 1, twin, patched=False, args=prefill_drafts.ATTENTION
    ) as server:
        return tokens({name: battery.generate(server, **body) for name, body in requests().items()})


@pytest.fixture(scope="module")
def pair(make_launcher: Callable[[str], Launcher], twin: Path) -> Iterator[disaggregated.Pair]:
    launcher = make_launcher("prefill-drafts")
    yield start_pair(launcher, twin, patched=True)
    launcher.stop_all()


@pytest.mark.parametrize("concurrency", [1, CONCURRENCY])
def test_greedy_answers_are_those_without_drafts(
    without_drafts: dict[str, list[int]], pair: disaggregated.Pair, concurrency: int
) -> None:
    answers = ask_all(pair, concurrency)
    assert tokens(answers) == without_drafts
    accepted = [answer["meta_info"]["spec_accept_length"] for answer in answers.values()]
    assert mean(accepted) > 1.3, "drafts are never right: nothing is shown here"


def test_nothing_waits_that_need_not(pair: disaggregated.Pair) -> None:
    """Proxies leave right behind a launch, outputs come from the last stage and are waited for behind one."""
    ask_all(pair, CONCURRENCY)
    recorded = traces(pair.prefill)
    # What stages ask one another about transfers fills the buffers, and not equally fast.
    since = max(order.launches(trace)[0] for trace in recorded.values())
    recorded = {
        stage: [event for event in trace if event.iteration >= since] for stage, trace in recorded.items()
    }
    assert len(order.launches(recorded[0])) == len(order.launches(recorded[1])) > 10
    assert not order.outputs_come_from_the_last_stage(recorded)
    assert not order.proxies_leave_right_behind_the_launch(recorded[0])
    for trace in recorded.values():
        assert not order.tokens_are_waited_for_behind_the_launch(trace)


@dataclass(frozen=True)
class Released:
    """Of an unpatched pair: its answers; a patched one, and the faults in it."""

    upstream: Answers
    pair: disaggregated.Pair
    faults: Faults


@pytest.fixture(scope="module")
def released(make_launcher: Callable[[str], Launcher], twin: Path) -> Iterator[Released]:
    launcher = make_launcher("first-drafts")
    faults = Faults(launcher.directory / "fault")
    try:
        upstream = ask_all(start_pair(launcher, twin, patched=False), 1)
        launcher.stop_all()
        yield Released(upstream, start_pair(launcher, twin, patched=True, faults=faults), faults)
    finally:
        launcher.stop_all()


@pytest.mark.release
@pytest.mark.parametrize("concurrency", [1, CONCURRENCY])
def test_as_many_drafts_are_accepted_as_upstreams(released: Released, concurrency: int) -> None:
    """The first round of a decode server verifies what the prefill server has drafted."""
    assert essence(ask_all(released.pair, concurrency)) == essence(released.upstream)


@pytest.mark.release
@pytest.mark.parametrize("fault", SILENT_PROPOSALS)
def test_of_other_drafts_other_many_are_accepted(released: Released, fault: str) -> None:
    """Tokens are the same: the comparison of what was accepted alone says that something is wrong."""
    released.faults.arm(fault)
    answers = ask_all(released.pair, CONCURRENCY)
    assert released.faults.struck > 0, "the fault never took effect"
    released.faults.arm(NONE)
    assert tokens(answers) == tokens(released.upstream)
    assert essence(answers) != essence(released.upstream)
    assert essence(ask_all(released.pair, CONCURRENCY)) == essence(released.upstream)
