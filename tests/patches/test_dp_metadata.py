"""What data-parallel ranks decide from each other's rows: upstream's own function, and with our gather.

The same generated states go through both, over gloo. The ranks are threads of this process, each with a gloo
group of its own, since a process that imports SGLang takes seconds to start. Stand-ins: the batches, which
are lists of numbers; the runner of graphs, which votes as it is told; what SGLang keeps in global variables.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from sglang.srt.batch_overlap import two_batch_overlap
from sglang.srt.managers.scheduler_components import dp_attn
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from rig.releases import RELEASES, Release
from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.fingerprints import source_in_file
from sglang_npu_pp.observe.telemetry import ChannelCounters
from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.patches import dp_metadata, pipeline
from sglang_npu_pp.patching import AppliedPatches
from sglang_npu_pp.row_gather import RowGather

RANKS = 4
LIMIT_S = 60.0
CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class State:
    """What one rank has to run."""

    kind: str  # "none", or a forward mode
    requests: tuple[
        tuple[int, int, int], ...
    ] = ()  # of each: prefix, new tokens, those without log-probability
    return_logprob: bool = False
    grammar: bool = False
    replays: bool = True  # the vote of the graph runner
    draft: bool | None = None  # whether the input of a speculative draft suits a graph


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is equal on all ranks."""

    replicas: int = RANKS
    stage: int = 1
    no_graphs: bool = False  # eager
    prefill_graphs: str = ""  # or "breakable", "full"
    overlap: bool = False  # two-batch overlap
    low_latency: bool = False
    gathers_tokens: bool = True
    metrics: bool = False
    interval: int = 0

    @property
    def per_replica(self) -> int:
        return RANKS // self.replicas


class Batch:
    """A schedule batch as far as the function looks at it."""

    def __init__(self, state: State) -> None:
        self.forward_mode = ForwardMode[state.kind.upper()]
        self.reqs = [SimpleNamespace(beam_group=None) for _ in state.requests]
        self.prefix_lens = [prefix for prefix, _, _ in state.requests]
        self.extend_lens = [new for _, new, _ in state.requests]
        self.extend_num_tokens = sum(self.extend_lens)
        without = (skipped if state.return_logprob else new for _, new, skipped in state.requests)
        self.extend_logprob_start_lens = list(without)
        self.return_logprob, self.has_grammar = state.return_logprob, state.grammar
        self.input_embeds = self.replace_embeds = self.seq_lens_cpu = None
        self.spec_info = None if state.draft is None else SimpleNamespace(cuda_graph_compatible=state.draft)
        self.replays = state.replays
        self.converted = False

    def batch_size(self) -> int:
        return len(self.reqs)

    def convert_decode_to_extend(self) -> None:
        self.converted, self.forward_mode = True, ForwardMode.EXTEND


def plain(value: Any) -> Any:
    """Comparable: what was decided about a batch, and which batch it is."""
    if isinstance(value, Batch):
        return {name: plain(each) for name, each in vars(value).items() if name not in ("reqs", "spec_info")}
    return value.tolist() if isinstance(value, torch.Tensor) else value


class Runner(dp_attn.PrefillCudaGraphRunner):
    """Votes as the state of its rank says."""

    max_context_size = max_seq_len = None
    enable_lora = False

    def __init__(self, state: State) -> None:
        self._replays = state.replays

    def can_replay_locally(self, **_: Any) -> bool:
        return self._replays


class Here(threading.local):
    """What SGLang keeps in global variables, of the rank whose thread asks."""

    setting: Setting
    parallel: Any
    metadata: dp_metadata.DPMetadata | None = None


HERE = Here()


class Rank:
    """One rank: its group, and its gather."""

    def __init__(self, index: int, store: dist.Store) -> None:
        self.index = index
        self.group = gloo_group(dist.PrefixStore("upstream", store), index)
        rows = gloo_group(dist.PrefixStore("rows", store), index)
        self.counters = ChannelCounters()
        width = len(dp_metadata.columns_of_this_release())
        self.rows = RowGather(rows, width, CPU, self.counters, where=f"stage 1 rank {index}")
        self.trace = Trace(enabled=True)

    def enter(self, setting: Setting, patched: bool) -> None:
        """Be this rank in this thread."""
        tp_group = SimpleNamespace(
            device_group=self.group,
            cpu_group=self.group,
            device=CPU,
            active_ranks=torch.ones(RANKS, dtype=torch.int32),
            active_ranks_cpu=torch.ones(RANKS, dtype=torch.int32),
        )
        HERE.setting = setting
        HERE.parallel = SimpleNamespace(
            dp_size=setting.replicas, attn_tp_size=setting.per_replica, attn_cp_size=1, tp_group=tp_group
        )
        HERE.metadata = None
        if patched:
            scheduler = SimpleNamespace(prefill_decode_interval=setting.interval)
            link = SimpleNamespace(stage=setting.stage, trace=self.trace)
            flow: Any = SimpleNamespace(link=link, slot=0, iteration=0)
            HERE.metadata = dp_metadata.DPMetadata(self.rows, scheduler, flow)


def gloo_group(store: dist.Store, index: int) -> dist.ProcessGroup:
    """As `init_process_group` makes it, but more than one a process."""
    backend = dist.ProcessGroupGloo(store, index, RANKS, timedelta(seconds=LIMIT_S))
    group = dist.ProcessGroup(store, index, RANKS)
    group._register_backend(CPU, dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


class Ranks:
    def __init__(self) -> None:
        store = dist.HashStore()
        self._pool = ThreadPoolExecutor(RANKS)
        self.ranks = self.results([self._pool.submit(Rank, index, store) for index in range(RANKS)])
        self.each(lambda rank: rank.rows.warm_up())

    def start(self, index: int, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return self._pool.submit(function, self.ranks[index], *arguments)

    def each(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The same in all ranks at the same time."""
        return self.results([self.start(index, function, *arguments) for index in range(RANKS)])

    def results(self, futures: Sequence[Future[Any]]) -> list[Any]:
        return [future.result(LIMIT_S) for future in futures]

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def prepare(state: State) -> Batch | None:
    """As `SchedulerDPAttnAdapter.prepare_mlp_sync_batch` calls it, and what the scheduler does behind it."""
    setting = HERE.setting
    model_runner = SimpleNamespace(
        prefill_cuda_graph_runner=Runner(state),
        spec_algorithm=SimpleNamespace(is_none=lambda: True),
        model_config=None,
    )
    batch = dp_attn.prepare_mlp_sync_batch_raw(
        None if state.kind == "none" else Batch(state),
        model_runner=model_runner,
        get_idle_batch=lambda: Batch(State("idle")),
        disable_cuda_graph=setting.no_graphs,
        require_mlp_tp_gather=setting.gathers_tokens,
        disable_overlap_schedule=True,
        offload_tags=set(),
    )
    return dp_attn.SchedulerDPAttnAdapter.maybe_convert_decode_to_extend(None, batch)


def decide(rank: Rank, setting: Setting, steps: Sequence[Sequence[State]], patched: bool) -> list[Any]:
    """For every step what became of this rank's batch, and whether that was decided only in the launch. Ranks
    of one replica run the same batch, as they do in a server."""
    rank.enter(setting, patched)
    found = []
    for states in steps:
        batch = prepare(states[rank.index // setting.per_replica])
        late = False
        if HERE.metadata is not None:
            late = HERE.metadata._unfinished is not None
            HERE.metadata.finish()
        found.append((plain(batch), late))
    return found


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with pytest.MonkeyPatch.context() as patch:
        none = SimpleNamespace(is_none=lambda: True)
        graphs = {"breakable": dp_attn.Backend.BREAKABLE, "full": dp_attn.Backend.FULL}
        stand_ins = {
            "get_parallel": lambda: HERE.parallel,
            "world_dp_gather_enabled": lambda: False,
            "check_cuda_graph_backend": lambda _, backend: graphs.get(HERE.setting.prefill_graphs) == backend,
            "get_moe_a2a_backend": lambda: none,
            "uses_ssm_state": lambda _: False,
            "get_memory": lambda: SimpleNamespace(enable_hisparse=False),
            "get_exec": lambda: SimpleNamespace(
                overlap=SimpleNamespace(enable_two_batch_overlap=HERE.setting.overlap)
            ),
            "get_cp_strategy": lambda: None,
        }
        for name, function in stand_ins.items():
            patch.setattr(dp_attn, name, function)
        mode = SimpleNamespace(is_low_latency=lambda: HERE.setting.low_latency)
        overlap = {
            "get_deepep_mode": lambda: SimpleNamespace(resolve=lambda _: mode),
            "get_moe_a2a_backend": lambda: SimpleNamespace(is_none=lambda: False),
            "is_tbo_enabled": lambda: HERE.setting.overlap,
            "get_tbo_token_distribution_threshold": lambda: 0.48,
        }
        for name, function in overlap.items():
            patch.setattr(two_batch_overlap, name, function)
        patch.setattr(pipeline, "_current", HERE)
        applied = AppliedPatches(dp_metadata.PATCHES)
        team = Ranks()
        yield team
        team.close()
        applied.undo()


REQUESTS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 9)).map(
        lambda given: (given[0], given[1], min(given[2], given[1]))
    ),
    min_size=1,
    max_size=4,
).map(tuple)
WORK = st.builds(
    State,
    kind=st.sampled_from(["decode", "decode", "extend", "extend", "mixed"]),
    requests=REQUESTS,
    return_logprob=st.booleans(),
    grammar=st.booleans(),
    replays=st.booleans(),
    draft=st.sampled_from([None, None, True, False]),
)
STATES = st.one_of(
    WORK, WORK, st.sampled_from([State("none"), State("none"), State("idle"), State("prebuilt")])
)
STEPS = st.lists(st.tuples(*[STATES] * RANKS), min_size=1, max_size=4)
SETTINGS = st.builds(
    Setting,
    replicas=st.sampled_from([RANKS, RANKS, 2]),
    stage=st.integers(0, 1),
    no_graphs=st.booleans(),
    prefill_graphs=st.sampled_from(["", "breakable", "full"]),
    overlap=st.booleans(),
    low_latency=st.booleans(),
    gathers_tokens=st.booleans(),
    metrics=st.booleans(),
    interval=st.sampled_from([0, 0, 3]),
)
NOTHING, DECODE = State("none"), State("decode", ((5, 1, 0),))
PREFILL = State("extend", ((0, 7, 7), (2, 3, 3)))


@example(
    Setting(), [(NOTHING, NOTHING, PREFILL, NOTHING), (NOTHING, NOTHING, DECODE, NOTHING), (NOTHING,) * 4]
)
@example(Setting(no_graphs=True), [(DECODE, PREFILL, DECODE, NOTHING), (DECODE,) * 4, (NOTHING,) * 4])
@example(Setting(prefill_graphs="breakable"), [(DECODE, PREFILL, DECODE, DECODE)])
@given(SETTINGS, STEPS)
def test_decisions_are_upstreams(ranks: Ranks, setting: Setting, steps: list[tuple[State, ...]]) -> None:
    """About every batch: token counts, votes for graphs, who runs idle, the common mode; in several steps,
    with one request on four ranks and requests that all end at once among them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dp_attn, "_ENABLE_METRICS_DP_ATTENTION", setting.metrics)
        expected = ranks.each(decide, setting, steps, False)
        found = ranks.each(decide, setting, steps, True)
    for index in range(RANKS):
        assert [batch for batch, _ in found[index]] == [batch for batch, _ in expected[index]]
        for (_, late), states in zip(found[index], steps, strict=True):
            kind = states[index // setting.per_replica].kind
            assert not (late and (kind in ("none", "idle", "prebuilt") or setting.stage == 0))


def step(rank: Rank, state: State) -> Batch | None:
    rank.enter(Setting(), patched=True)
    return prepare(state)


def finish(rank: Rank, metadata: dp_metadata.DPMetadata) -> None:
    rank.enter(Setting(), patched=True)
    HERE.metadata = metadata
    metadata.finish()


def begin(rank: Rank, state: State) -> tuple[Batch | None, dp_metadata.DPMetadata]:
    """Up to where the scheduler waits for proxies."""
    batch = step(rank, state)
    assert HERE.metadata is not None
    return batch, HERE.metadata


def test_a_rank_with_a_batch_does_not_wait_for_the_others(ranks: Ranks) -> None:
    """No other rank has posted when it goes on, as if all had its row; `finish` brings the decisions."""
    batch, metadata = ranks.start(0, begin, DECODE).result(LIMIT_S)
    assert batch is not None
    assert batch.global_num_tokens == [1] * RANKS
    others = [ranks.start(index, step, NOTHING) for index in range(1, RANKS)]
    finishing = ranks.start(0, finish, metadata)
    idle = ranks.results(others)
    finishing.result(LIMIT_S)
    assert [plain(each)["forward_mode"] for each in idle] == [ForwardMode.IDLE] * (RANKS - 1)
    assert batch.global_num_tokens == [1, 0, 0, 0]


def test_a_wait_that_upstream_carries_over_is_left_to_the_final_decisions(ranks: Ranks) -> None:
    """From 0.5.22 on, for the metrics: upstream's function takes it and sets it to 0."""

    def run(rank: Rank) -> tuple[list[float], float]:
        carry, taken = SimpleNamespace(seconds=0.25), list[float]()

        def original(batch: Batch, sync_wait_carry: Any) -> Batch:
            prepare_rows(rank)
            taken.append(sync_wait_carry.seconds)
            sync_wait_carry.seconds = 0.0
            return batch

        rank.enter(Setting(), patched=True)
        assert HERE.metadata is not None
        HERE.metadata.prepare(original, Batch(DECODE), sync_wait_carry=carry)
        HERE.metadata.finish()
        return taken, carry.seconds

    def prepare_rows(rank: Rank) -> None:
        assert HERE.metadata is not None
        names = [column.name for column in dp_metadata.columns_of_this_release()]
        info = SimpleNamespace(**dict.fromkeys(names, 1), tp_size=1, cp_size=1)
        info.local_forward_mode, info.can_run_prefill_cuda_graph = ForwardMode.DECODE.value, False
        HERE.metadata.gather(info)

    assert ranks.each(run) == [([0.25, 0.25], 0.0)] * RANKS


def test_each_step_is_one_gather_on_the_same_memory(ranks: Ranks) -> None:
    rows = [rank.rows for rank in ranks.ranks]
    before = [(rank.counters.messages, rank.rows._rows.data_ptr()) for rank in ranks.ranks]
    ranks.each(decide, Setting(), [(DECODE, PREFILL, NOTHING, NOTHING)] * 5, True)
    after = [(rank.counters.messages, rank.rows._rows.data_ptr()) for rank in ranks.ranks]
    assert after == [(messages + 5, where) for messages, where in before]
    assert not any(gather.posted for gather in rows)


def test_a_batch_that_was_not_launched_is_finished_before_the_next(ranks: Ranks) -> None:
    steps = [(DECODE,) * RANKS, (NOTHING,) * RANKS]

    def forget_to_launch(rank: Rank) -> Any:
        batch, metadata = begin(rank, steps[0][rank.index])
        assert prepare(steps[1][rank.index]) is None
        assert metadata._unfinished is None
        return batch

    assert [batch.global_num_tokens for batch in ranks.each(forget_to_launch)] == [[1] * RANKS] * RANKS


def test_a_batch_that_changes_behind_the_others_backs_is_refused(ranks: Ranks) -> None:
    def change(rank: Rank) -> str:
        batch, metadata = begin(rank, DECODE)
        assert batch is not None
        batch.reqs = batch.reqs * 2
        with pytest.raises(PipelineError, match=r"^stage 1 rank \d: the batch .*; report this\.$") as error:
            metadata.finish()
        rank.rows.wait()
        return str(error.value)

    assert all(f"rank {index}" in text for index, text in enumerate(ranks.each(change)))


INSTALLED = [release for release in RELEASES.values() if release.is_installed]


@pytest.mark.parametrize("release", INSTALLED, ids=lambda release: release.name)
def test_columns_are_those_of_every_release(release: Release) -> None:
    """What upstream packs, in its order, read in its source."""
    if release.folder is None:
        spec = importlib.util.find_spec("sglang")
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
    else:
        root = release.folder / "sglang"
    source = (root / "srt/managers/scheduler_components/dp_attn.py").read_text()
    packed = source_in_file(source, "MLPSyncBatchInfo._get_local_tensor")
    declared = source_in_file(source, "MLPSyncBatchInfo")
    assert packed is not None
    assert declared is not None
    (numbers,) = (node for node in ast.walk(ast.parse(textwrap.dedent(packed))) if isinstance(node, ast.List))
    names = [n.attr for each in numbers.elts for n in ast.walk(each) if isinstance(n, ast.Attribute)]
    (body,) = ast.parse(declared).body
    assert isinstance(body, ast.ClassDef)
    fields = {
        n.target.id for n in body.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
    }
    assert [column.name for column in dp_metadata.COLUMNS if column.name in fields] == names
    results = {column.result for column in dp_metadata.COLUMNS if column.name in fields} - {None}
    assert results <= fields
