"""Stages of a server with a hierarchical cache decide alike without waiting for each other or for a slow
storage, and copies wait for forwards.

That servers answer alike is shown by tests/server/test_hierarchical_cache.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import Queue
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rig.harness import Here, Team, results
from sglang_npu_pp.patches.hierarchical_cache import start_loading, start_writing
from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.ready_counts import ReadyCounts

STAGES = 3
ROUNDS = 8  # fewer than a window has messages: none is taken
LONG, BACKUPS = 100, 10


@pytest.fixture(autouse=True)
def no_pipeline_afterwards() -> Iterator[None]:
    yield
    set_current(None)


# --- in a process for each stage -------------------------------------------------------------------------


def cache_of(here: Here) -> Any:
    """What upstream's functions of the synchronisation read of a cache, with these functions."""
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    class Cache(SimpleNamespace):
        drain, sync = UnifiedRadixCache._drain_async_work, UnifiedRadixCache._all_reduce
        _pp_sync = UnifiedRadixCache._pp_sync
        _all_reduce, _all_reduce_attn_groups = sync, UnifiedRadixCache._all_reduce_attn_groups
        _count_ready_acks = UnifiedRadixCache._count_ready_acks
        _sync_hicache_ready_counts = UnifiedRadixCache._sync_hicache_ready_counts

    groups = dict.fromkeys(("attn_cp_group", "attn_tp_group", "tp_group"))
    ranks = {"tp_world_size": 1, "pp_rank": here.index, "pp_size": STAGES}
    return Cache(pp_group=torch.distributed.group.WORLD, work_list=[], **groups, **ranks)


def prepare(here: Here, patched: bool) -> Any:
    """Put the functions in force; returns the pipeline."""
    import sglang_npu_pp

    sglang_npu_pp.deactivate()
    if patched:
        assert sglang_npu_pp.activate()
    pipeline: Any = SimpleNamespace(
        link=here.link, ready_counts=ReadyCounts(STAGES), reported_counts=(), iteration=-1
    )
    set_current(pipeline)
    return pipeline


def decide(here: Here, patched: bool, rounds: int) -> list[Any]:
    """What this stage has after each synchronisation: several an iteration, of several shapes."""
    pipeline, cache, decided = prepare(here, patched), cache_of(here), []
    for iteration in range(rounds):
        pipeline.iteration = iteration
        cache.drain()
        for data in (torch.tensor([iteration, 7, -1], dtype=torch.int64), torch.tensor(iteration % 2)):
            if here.index > 0:
                data.zero_()
            cache.sync(data, torch.distributed.ReduceOp.MIN)
            decided.append(data.tolist())
        assert not (patched and cache.work_list), "there is nothing to wait for"
    cache.drain()
    return decided


def back_up(here: Here, patched: bool, first: int) -> tuple[list[int], int]:
    """Of BACKUPS to storage, one finishes here in each iteration from `first` on. Returns how many were
    handled in each iteration, and for how many of these this stage would have had to wait."""
    pipeline, cache = prepare(here, patched), cache_of(here)
    names = ("prefetch_hit_queue", "ack_prefetch_queue", "ack_backup_queue", "host_mem_release_queue")
    queues = {name: Queue[int]() for name in names}
    cache.cache_controller = SimpleNamespace(ack_write_queue=[], ack_load_queue=[], **queues)
    cache.enable_storage, cache.host_memory_mode = True, "cache"
    cache.tree_core = SimpleNamespace(write_back_duplicate_reclaim_digest=0)
    finished, handled, late = 0, [], 0
    for pipeline.iteration in range(LONG):
        cache.drain()
        if first <= pipeline.iteration < first + BACKUPS:
            queues["ack_backup_queue"].put(finished)
            finished += 1
        handled.append(cache._sync_hicache_ready_counts()[2][2])
        late += max(0, sum(handled) - finished)
        for _ in range(min(handled[-1], queues["ack_backup_queue"].qsize())):
            queues["ack_backup_queue"].get()
    cache.drain()
    return handled, late


def expected(rounds: int) -> list[Any]:
    return [each for iteration in range(rounds) for each in ([iteration, 7, -1], iteration % 2)]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    team = Team(STAGES, process_group=True, environment={"SGLANG_USE_CPU_ENGINE": "1"})
    try:
        yield team
    finally:
        team.close()


@pytest.mark.slow
def test_the_first_stage_waits_for_no_other(team: Team) -> None:
    """It has ended before the others begin. Upstream's waits for them in its second iteration."""
    team.open_lanes(STAGES)
    first, *others = team.ranks
    assert first.start(decide, True, ROUNDS).result(limit_s=120) == expected(ROUNDS)
    calls = [rank.start(decide, True, ROUNDS) for rank in others]
    assert results(calls, limit_s=120) == [expected(ROUNDS)] * len(others)


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
def test_all_stages_decide_what_the_first_does(team: Team, patched: bool) -> None:
    """For more messages than a window has."""
    team.open_lanes(STAGES)
    calls = [rank.start(decide, patched, LONG) for rank in team.ranks]
    assert results(calls, limit_s=120) == [expected(LONG)] * STAGES


@pytest.mark.slow
@pytest.mark.parametrize("patched", [False, True])
def test_no_stage_waits_for_its_own_storage(team: Team, patched: bool) -> None:
    """The later a stage, the slower its storage is here."""
    team.open_lanes(STAGES)
    calls = [rank.start(back_up, patched, 15 * rank.index) for rank in team.ranks]
    handled, late = zip(*results(calls, limit_s=120), strict=True)
    assert handled == (handled[0],) * STAGES
    assert sum(handled[0]) == BACKUPS
    assert (max(late) > 0) != patched


# --- copies between device and host ----------------------------------------------------------------------


class Stream:
    def __init__(self, name: str, seen: list[str]) -> None:
        self._name, self._seen = name, seen

    def wait_event(self, event: str) -> None:
        self._seen.append(f"{self._name} waits for {event}")


def controller_of(release: str, seen: list[str]) -> Any:
    to_host, to_device = Stream("to host", seen), Stream("to device", seen)
    if release == "0.5.17":
        return SimpleNamespace(write_stream=to_host, load_stream=to_device)
    engine = SimpleNamespace(device_to_host_stream=to_host, host_to_device_stream=to_device)
    fence = {} if release == "0.5.18" else {"load_fence_stream": "of forwards"}
    return SimpleNamespace(l2_transfer_engine=engine, **fence)


@pytest.mark.parametrize("release", ["0.5.17", "0.5.18", "0.5.19"])
@pytest.mark.parametrize("launched", [None, "the launch"])
def test_copies_wait_for_the_last_launch(release: str, launched: str | None) -> None:
    seen: list[str] = []
    controller = controller_of(release, seen)
    set_current(SimpleNamespace(last_launched=launched))  # type: ignore[arg-type]

    def run(wrapper: Callable[..., Any], name: str) -> list[str]:
        seen.clear()

        def original(_: Any) -> int:
            seen.append(name)
            return 5

        wrapper(original, controller)
        return list(seen)

    waits = launched is not None
    assert run(start_writing, "copy") == [*(["to host waits for the launch"] if waits else []), "copy"]
    waits = waits and release != "0.5.19"  # from then on upstream's own fence
    assert run(start_loading, "copy") == [*(["to device waits for the launch"] if waits else []), "copy"]
