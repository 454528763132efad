"""What Ascend users combine with stages, on real servers at pp 2 on CPU, patched against unpatched.

"adapters" has LoRA at tp 1, "sequences" context-parallel attention at tp 2 cp 2 and expert parallelism; both
have dynamic chunk sizes and uneven stages. Both are float32, so that greedy tokens do not depend on what
shares a batch. What SGLang has for accelerators only comes from `rig/probes/layouts_probe.py`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from rig import battery
from rig.adapters import write_adapter
from rig.agreement import LIMIT_S, POLL_S, held, states
from rig.faults import AGAIN, Faults
from rig.launcher import MOE_MODEL, ROOT, Launcher
from rig.probes import probe_variables
from rig.probes.layouts_probe import milliseconds, prefills
from rig.probes.sglang_pp_faults import NONE
from rig.probes.sglang_pp_feature_faults import SLICE_BEFORE
from rig.server import Server

pytestmark = pytest.mark.release

CHUNK = 256  # tokens, of the launcher's servers
LENGTHS = (1, 2, 7, 64, 255, 256, 257, 300, 511, 700, 1000, 1500)  # tokens
LONGEST = "longest"  # name of a request of 1500 tokens
ABORTED = 24
ADAPTERS = ("one", "two", None)
CONTEXT_PARALLEL = 2
BLOCKS = 2 * CONTEXT_PARALLEL  # of a sequence, two for each rank

ARGUMENTS: tuple[str, ...] = ("--enable-dynamic-chunking",)
LORA: tuple[str, ...] = ("--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", "3")
SLICES: tuple[str, ...] = (
    *("--attn-cp-size", str(CONTEXT_PARALLEL), "--enable-prefill-cp", "--cp-strategy", "zigzag"),
    *("--ep-size", "2"),
)
PROBES = {
    "SGLANG_PP_LAYER_PARTITION": "3,1",
    **probe_variables("sglang_pp_probe", "layouts_probe", paths=[ROOT]),
}


@dataclass
class Observed:
    """What one server answered and did."""

    alone: list[Any] = field(default_factory=list)
    together: list[Any] = field(default_factory=list)  # twelve at a time
    at_once: list[Any] = field(default_factory=list)  # equal lengths, which all end in the same step
    adapted: list[Any] = field(default_factory=list)  # one prompt, with each adapter
    after_aborts: Any = None  # the first of `alone` once more
    states: list[dict[str, Any]] = field(default_factory=list)  # of idle schedulers, in the order of ranks
    prefills: dict[tuple[int, int], Any] = field(default_factory=dict)  # by stage and rank


@dataclass(frozen=True)
class Case:
    name: str
    tp: int
    args: tuple[str, ...]
    adapters: tuple[str | None, ...] = (None,)

    def __str__(self) -> str:
        return self.name


ADAPTED = Case("adapters", 1, LORA, ADAPTERS)
SEQUENCES = Case("sequences", 2, SLICES)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        f"{name}={write_adapter(folder / name, MOE_MODEL, seed)}"
        for seed, name in enumerate(name for name in ADAPTERS if name)
    ]


@dataclass(frozen=True)
class Both:
    case: Case
    upstream: Observed
    patched: Observed


@pytest.fixture(
    scope="module",
    params=[ADAPTED, SEQUENCES],  # the second has eight schedulers
    ids=str,
)
def both(
    request: pytest.FixtureRequest, make_launcher: Callable[[str], Launcher], adapters: list[str]
) -> Iterator[Both]:
    case: Case = request.param
    launcher = make_launcher(f"layouts-{case.name}")
    paths = ("--lora-paths", *adapters) if len(case.adapters) > 1 else ()
    args = (*ARGUMENTS, *case.args, *paths)
    yield Both(case, *(observe(launcher, case, args, patched=patched) for patched in (False, True)))
    launcher.stop_all()


def observe(launcher: Launcher, case: Case, args: tuple[str, ...], *, patched: bool) -> Observed:
    folder = launcher.directory / f"prefills-{'patched' if patched else 'upstream'}"
    folder.mkdir()
    env = {**PROBES, "LAYOUTS_PROBE_DIR": str(folder), "PP_PROBE_STATES": "1"}
    with launcher.configure(case.tp, 2, patched=patched, model=MOE_MODEL, args=args, env=env) as server:
        observed = ask_everything(server, case.adapters)
        abort_some(server)
        observed.after_aborts = ask(server, LENGTHS[0], adapter=case.adapters[0])
        observed.states = wait_until_idle(server)
    observed.prefills = dict(prefills(folder))
    return observed


def ask(
    server: Server, length: int, seed: int = 0, adapter: str | None = None, name: str | None = None
) -> Any:
    options = {"lora_path": adapter, "rid": name}
    given = {option: value for option, value in options.items() if value is not None}
    return battery.ask_tokens(server, length, seed, **given)


def ask_everything(server: Server, adapters: tuple[str | None, ...]) -> Observed:
    """One at a time, then many."""

    def adapted(index: int) -> str | None:
        return adapters[index % len(adapters)]

    found = Observed()
    for index, length in enumerate(LENGTHS):
        name = LONGEST if length == LENGTHS[-1] else None
        found.alone.append(ask(server, length, adapter=adapted(index), name=name))
    found.adapted = [ask(server, 40, adapter=adapter) for adapter in adapters]
    with ThreadPoolExecutor(12) as pool:
        found.together = list(
            pool.map(lambda i: ask(server, LENGTHS[i % len(LENGTHS)], i + 1, adapted(i)), range(36))
        )
        found.at_once = list(pool.map(lambda i: ask(server, 40, i, adapted(i)), range(6)))
    return found


def abort_some(server: Server) -> None:
    """At any time: while they wait, between chunks, in decode, and when they have ended."""

    def ask_and_abort(index: int) -> None:
        with ThreadPoolExecutor(1) as asking:
            answer = asking.submit(
                server.post,
                "/generate",
                {
                    "rid": f"aborted-{index}",
                    "input_ids": battery.prompt(LENGTHS[index % len(LENGTHS)], seed=100 + index),
                    "sampling_params": {"temperature": 0, "max_new_tokens": 40, "ignore_eos": True},
                },
            )
            time.sleep(0.3 * random.Random(index).random())
            server.post("/abort_request", {"rid": f"aborted-{index}"})
            answer.result(timeout=120)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(ask_and_abort, range(ABORTED)))


def wait_until_idle(server: Server) -> list[dict[str, Any]]:
    """What the schedulers hold once nothing is left to do, and both stages say the same."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        found = states(server)
        ranks = len(found) // 2
        if all(found) and found[:ranks] == found[ranks:] and not held(found):
            return found
        server.check_alive("while its stages were compared")
        assert time.monotonic() < deadline, f"after {LIMIT_S:.0f} s the stages hold {found}"
        time.sleep(POLL_S)


# --- tests ---------------------------------------------------------------------------------------------


def test_answers_are_upstreams(both: Both) -> None:
    """Alone, many at a time, all ending at once; tokens and log-probabilities."""
    for name in ("alone", "adapted", "together", "at_once"):
        before = {str(index): answer for index, answer in enumerate(getattr(both.upstream, name))}
        now = {str(index): answer for index, answer in enumerate(getattr(both.patched, name))}
        assert not battery.differences(before, now), name


def test_every_adapter_says_something_else(both: Both) -> None:
    answers = {str(answer) for answer in both.patched.adapted}
    assert len(answers) == len(both.case.adapters)


def test_after_aborts_the_stages_agree_and_answer_as_before(both: Both) -> None:
    """`wait_until_idle` has compared what they hold."""
    assert len(both.patched.states) == 2 * both.case.tp
    assert not battery.differences({"": both.patched.alone[0]}, {"": both.patched.after_aborts})


def test_all_ranks_run_the_same_prefills(both: Both) -> None:
    """Requests, tokens before and tokens in each."""
    first, *others = ([without_rows(line) for line in lines] for lines in both.patched.prefills.values())
    assert first
    assert others == [first] * (2 * both.case.tp - 1)


def test_all_ranks_run_the_chunks_that_upstream_predicts(both: Both) -> None:
    """SGLang's own predictor, with the samples of the probe."""
    for observed in (both.upstream, both.patched):
        for lines in observed.prefills.values():
            chunks = [line["tokens"] for line in lines if line["requests"] == [LONGEST]]
            assert [tokens for (tokens,) in chunks] == predicted_chunks(LENGTHS[-1])


def test_each_context_parallel_rank_sends_its_own_slice(both: Both) -> None:
    """Of prefills that are long enough; of others, and without context parallelism, all rows."""
    lines = [line for rank in range(both.case.tp) for line in both.patched.prefills[0, rank]]
    split = [line for line in lines if both.case.args is SLICES and min(line["tokens"]) >= BLOCKS]
    whole = [line for line in lines if line not in split]
    assert bool(split) == (both.case.args is SLICES)
    assert whole
    assert [line["rows"] for line in split] == [rows_of_a_slice(line["tokens"]) for line in split]
    assert [line["rows"] for line in whole] == [sum(line["tokens"]) for line in whole]


@pytest.mark.release
def test_a_slice_of_another_microbatch_changes_answers(make_launcher: Callable[[str], Launcher]) -> None:
    """Planted on one context-parallel rank; before and afterwards answers are equal."""
    launcher = make_launcher("slices")
    faults = Faults(launcher.directory / "fault")
    env = PROBES | faults.variables
    answers, struck = [], []
    with launcher.configure(
        SEQUENCES.tp, 2, patched=True, model=MOE_MODEL, args=SEQUENCES.args, env=env
    ) as server:
        for fault in (NONE, SLICE_BEFORE, f"{NONE}{AGAIN}"):
            assert server.post("/flush_cache").ok
            faults.arm(fault)
            answers.append({str(length): ask(server, length) for length in LENGTHS})
            struck.append(faults.struck)
    without, planted, again = answers
    assert struck[1] > 0, "the fault never took effect"
    assert (struck[0], struck[2]) == (0, 0)
    assert battery.differences(without, planted)
    assert not battery.differences(without, again)


def without_rows(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "rows"}


def predicted_chunks(length: int) -> list[int]:
    from sglang.srt.managers.scheduler_components.dynamic_chunk_sizer import ChunkSizePredictor

    samples = [round(1.25 * CHUNK) - 2 * index for index in range(128)]
    predictor = ChunkSizePredictor()
    predictor.fit(samples, [milliseconds(sample) for sample in samples])
    predictor.set_target_latency(CHUNK)
    predictor.is_ready = True
    chunks = [CHUNK]
    while (done := sum(chunks)) < length:
        size = predictor.predict_next_chunk_size(done, CHUNK, page_size=1, context_len=4096)
        chunks.append(min(size or CHUNK, length - done))
    return chunks


def rows_of_a_slice(tokens: list[int]) -> int:
    """Of the rank with more, filled up to whole blocks: rank 0 has blocks 0 and 3 of each sequence, rank 1
    blocks 1 and 2."""
    rows = [0, 0]
    for length in tokens:
        base, longer = divmod(length, BLOCKS)
        sizes = [base + (block < longer) for block in range(BLOCKS)]
        rows[0] += sizes[0] + sizes[3]
        rows[1] += sizes[1] + sizes[2]
    return -(-max(rows) // BLOCKS) * BLOCKS
