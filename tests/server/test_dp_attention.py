"""Data-parallel attention on a real server, tp 2 dp 2 pp 2 on CPU, patched against unpatched; each group has
a vocabulary of its own there.

Everything is float32, so that greedy tokens depend neither on who shares a batch nor on the number of stages;
the unpatched server has one, because its start takes half as long.

With DP_ATTENTION_DEVICE=npu-sim both run on the simulated NPU, which takes minutes. SGLang's experts answer
in bfloat16 there, so everything is that, and the unpatched server has two stages as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from rig import battery
from rig.launcher import MOE_MODEL, Launcher
from rig.server import Server
from sglang_npu_pp.observe.telemetry import Snapshot, read_snapshots
from sglang_npu_pp.observe.trace import Event, read_traces

from .clocks import OTHERS, Conversation, advance, greedy

pytestmark = pytest.mark.thorough

LENGTHS = (1, 7, 64, 255, 300, 700)  # tokens; chunks are 256 for both ranks together
DEVICE = os.environ.get("DP_ATTENTION_DEVICE", "cpu")
ON_CPU = DEVICE == "cpu"
FURTHER = ("--enable-dp-lm-head",) if ON_CPU else ("--dtype", "bfloat16")
ARGUMENTS = ("--dp-size", "2", "--enable-dp-attention", *FURTHER)


@dataclass
class Observed:
    alone: list[Any]  # one request at a time: one data-parallel rank has nothing to run
    together: list[Any]
    at_once: list[Any]  # equal requests, which all end in the same step


def ask_everything(server: Server) -> Observed:
    def ask(length: int, seed: int = 0) -> Any:
        return battery.ask_tokens(server, length, seed)

    alone = [ask(length) for length in LENGTHS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda seed: ask(LENGTHS[seed % len(LENGTHS)], seed), range(12)))
        at_once = list(pool.map(lambda seed: ask(40, seed), range(4)))
    return Observed(alone, together, at_once)


@pytest.fixture(scope="module")
def launcher(make_launcher: Callable[[str], Launcher]) -> Iterator[Launcher]:
    launcher = make_launcher("dp-attention")
    yield launcher
    launcher.stop_all()


@pytest.fixture(scope="module")
def upstream(launcher: Launcher) -> Observed:
    stages = 1 if ON_CPU else 2
    with launcher.configure(
        2, stages, patched=False, device=DEVICE, model=MOE_MODEL, args=ARGUMENTS
    ) as server:
        return ask_everything(server)


@dataclass
class Patched:
    observed: Observed
    snapshots: list[Snapshot]
    traces: dict[tuple[int, int], list[Event]]  # by stage and rank
    conversations: list[tuple[Any, Any]]  # what was answered in each, and what to the same without a session


@pytest.fixture(scope="module")
def patched_dp(launcher: Launcher) -> Patched:
    env = {"PP_PROBE_CLOCKS": "1"}
    with launcher.configure(
        2, 2, patched=True, device=DEVICE, model=MOE_MODEL, args=ARGUMENTS, env=env
    ) as server:
        observed = ask_everything(server)
        server.dump_telemetry()
        folder = server.log.parent
        found = [trace for rank in (0, 1) for trace in read_traces(folder, rank)]
        traces = {(trace.stage, trace.rank): whole_iterations(trace.events) for trace in found}
        return Patched(observed, read_snapshots(folder), traces, converse(server))


def converse(server: Server) -> list[tuple[Any, Any]]:
    """With each group of ranks, whose later stages then have clocks that are far ahead."""
    conversations = [Conversation(server, routed_dp_rank=rank) for rank in (0, 1)]
    for conversation in conversations:
        conversation.turn()
    advance(server, OTHERS)
    turns = [conversation.turn() for conversation in conversations]
    return [(answer, battery.generate(server, **greedy(asked))["output_ids"]) for asked, answer in turns]


def whole_iterations(events: list[Event]) -> list[Event]:
    """From the first iteration that is all there: an idle server goes round and round, and the oldest events
    are dropped."""
    return events[[event.name for event in events].index("iteration") :]


def test_answers_are_upstreams(upstream: Observed, patched_dp: Patched) -> None:
    """Alone on two ranks, many at a time, and all ending at once."""
    for name, answers in vars(upstream).items():
        before = {str(index): answer for index, answer in enumerate(answers)}
        now = {str(index): answer for index, answer in enumerate(getattr(patched_dp.observed, name))}
        assert not battery.differences(before, now), name


def test_a_session_lives_as_long_as_the_first_stage_says(patched_dp: Patched) -> None:
    for answer, without_session in patched_dp.conversations:
        assert answer == without_session


def test_every_rank_gathers_once_an_iteration(patched_dp: Patched) -> None:
    """Whether it has a batch or not, and it is what the others do."""
    assert len(patched_dp.traces) == 4
    for trace in patched_dp.traces.values():
        iterations = [e.iteration for e in trace if e.name == "iteration"]
        posted = [e.iteration for e in trace if (e.name, e.kind) == ("post", "metadata")]
        assert posted == iterations[: len(posted)]
        assert len(iterations) - len(posted) <= 1
    for snapshot in patched_dp.snapshots:
        counters = snapshot.received["metadata"]
        assert 0 <= counters["messages"] - counters["waits"] <= 1


def test_metadata_are_read_behind_the_proxies(patched_dp: Patched) -> None:
    """By a rank of a later stage that has a batch; one without reads at once, to know whether it runs idle.
    On the first stage, which waits for no proxies, all read at once."""
    for (stage, _), trace in patched_dp.traces.items():
        orders = [order_before(trace, iteration) for iteration in launched(trace)]
        at_once, later = ["post", "wait", "ready"], ["post", "proxy", "wait", "ready"]
        if stage == 0:
            assert all(order == at_once for order in orders)
        else:
            assert all(order in (later, [*at_once, "proxy"]) for order in orders)
            assert later in orders
            assert [*at_once, "proxy"] in orders


def launched(trace: list[Event]) -> list[int]:
    return [event.iteration for event in trace if event.name == "launch"]


def order_before(trace: list[Event], iteration: int) -> list[str]:
    """What an iteration did with metadata and proxies until its launch."""
    mine = [event for event in trace if event.iteration == iteration]
    return [
        "proxy" if event.kind == "proxy" else event.name
        for event in mine[: [event.name for event in mine].index("launch")]
        if event.kind == "metadata" or (event.name, event.kind) == ("ready", "proxy")
    ]
