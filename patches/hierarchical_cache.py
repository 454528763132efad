"""Seam: a cache with a second tier in host memory (and a third in storage), on a server with stages.

Stage 0 decides, for all stages, how many finished copies and storage operations an iteration handles.
Upstream passes the numbers from stage to stage over gloo: each stage waits for the previous one in every
iteration, idle ones included, and for its own last send to be received. Here stage 0 pushes them to every
stage.

What is not finished on a later stage blocks its scheduler there, for as long as its storage takes. Here later
stages report what is finished, and stage 0 decides on no more.

A backup to the host is ordered behind the schedule stream. Upstream's schedule stream waits for each launch,
since it sends the launch's proxies; ours does not.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.ready_counts import Counts, left
from sglang_npu_pp.transport.message import Kind

from .pipeline import AsyncPipeline, current

_UNIFIED = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
_HIRADIX = "sglang.srt.mem_cache.hiradix_cache:HiRadixCache"
_CONTROLLER = "sglang.srt.managers.cache_controller:HiCacheController"
_STORAGE_QUEUES = ("prefetch_hit_queue", "ack_prefetch_queue", "ack_backup_queue", "host_mem_release_queue")
_HYBRID = "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller:HybridCacheController"


def pp_sync(original: Any, cache: Any, data: torch.Tensor) -> None:
    """`data`: integers, on stage 0 read, on later stages written. No caller waits for a send of ours:
    `work_list` stays empty."""
    pipeline = current()
    link = pipeline.link
    if link.stage > 0:
        decided = link.post(Kind.CACHE, 0, iteration=pipeline.iteration).wait_values()
        data.copy_(torch.tensor(decided, dtype=data.dtype).view_as(data))
        return
    for stage in range(1, link.stages):
        link.push(Kind.CACHE, stage, data.tolist(), iteration=pipeline.iteration)


def sync_ready_counts(original: Any, cache: Any) -> Any:
    """Returns upstream's numbers: of write acknowledgements, load acknowledgements, and by storage queue."""
    pipeline = current()
    ready = _ready_here(cache)
    if ready is None:
        return original(cache)
    if pipeline.link.stage > 0:
        _report(pipeline, ready)
        result, decided = _decided(original, cache)
        pipeline.reported_counts = left(pipeline.reported_counts, decided)
        return result
    counts = pipeline.ready_counts
    for stage in range(1, pipeline.link.stages):
        for iteration, reported in pipeline.link.take_arrived(Kind.CACHE, stage):
            counts.report(stage, iteration, reported)
    counts.applies = True
    try:
        result, decided = _decided(original, cache)
    finally:
        counts.applies = False
    counts.decide(pipeline.iteration, decided)
    return result


def _decided(original: Any, cache: Any) -> tuple[Any, Counts]:
    result = original(cache)
    writes, loads, storage, _ = result
    return result, (writes, loads, *storage)


def all_reduce(original: Any, cache: Any, data: torch.Tensor, operation: Any) -> None:
    """In `sync_ready_counts`, on stage 0: before its ranks take the minimum. Two digests come last."""
    counts = current().ready_counts
    if counts.applies:
        data[:-2] = torch.tensor(counts.limit(data[:-2].tolist()), dtype=data.dtype)
    original(cache, data, operation)


def _ready_here(cache: Any) -> Counts | None:
    """As upstream counts on stage 0; None where stages do not follow it, or count in another order."""
    controller = cache.cache_controller
    follows = getattr(cache, "host_memory_mode", "cache") != "buffer_only"
    if controller is None or not follows or not hasattr(controller, "ack_prefetch_queue"):  # up to 0.5.18
        return None
    copies = [
        cache._count_ready_acks(queue) for queue in (controller.ack_write_queue, controller.ack_load_queue)
    ]
    if not cache.enable_storage:
        return tuple(copies)
    queues = [getattr(controller, name) for name in _STORAGE_QUEUES]
    queues += getattr(controller, "extra_host_mem_release_queues", {}).values()
    return (*copies, *(queue.qsize() for queue in queues))


def _report(pipeline: AsyncPipeline, ready: Counts) -> None:
    """In a later iteration, if stage 0 has not taken the last ones: it may be waiting for this stage."""
    link = pipeline.link
    if ready != pipeline.reported_counts and link.has_room(Kind.CACHE, 0):
        pipeline.reported_counts = ready
        link.push(Kind.CACHE, 0, (pipeline.iteration, ready), iteration=pipeline.iteration)


def start_writing(original: Any, controller: Any) -> None:
    """A chunk may enter the cache before its forward has ended."""
    _wait_for_launch(_stream(controller, "write_stream", "device_to_host_stream"))
    original(controller)


def start_loading(original: Any, controller: Any) -> Any:
    """A page may have been freed by an abort before the forward that writes it has ended. From 0.5.19 on
    upstream waits itself."""
    if getattr(controller, "load_fence_stream", None) is None:
        _wait_for_launch(_stream(controller, "load_stream", "host_to_device_stream"))
    return original(controller)


def _wait_for_launch(stream: Any) -> None:
    """The stream, not the host."""
    launched = current().last_launched
    if launched is not None:
        stream.wait_event(launched)


def _stream(controller: Any, name: str, name_in_engine: str) -> Any:
    """Up to 0.5.17 of the controller."""
    return getattr(controller, name, None) or getattr(controller.l2_transfer_engine, name_in_engine)


_UPSTREAM = "sglang #33473, #34287, #34568, #36700"
_PLAN = "goes when upstream decides on stage 0 and sends without a rendezvous"


def _synchronised(target: str, optional: bool = False) -> Patch:
    return Patch(
        target=f"{target}._pp_sync",
        wrapper=pp_sync,
        why="later stages wait for a gloo message of the previous stage in every iteration, each stage for "
        "its last one to be received; with a time-out of prefetches once more for each waiting request",
        how="stage 0 pushes its numbers to every stage at once",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=optional,
        relies_on=(
            f"{target}._all_reduce",
            f"{target}._drain_async_work",
            f"{target}.check_hicache_events",
            f"{target}.writing_check",
            f"{target}.loading_check",
        ),
    )


def _writes(target: str, unless: str | None = None) -> Patch:
    return Patch(
        target=f"{target}.start_writing",
        wrapper=start_writing,
        why="a chunk is copied to the host in the iteration after its launch; only waits of the schedule "
        "stream, of which sends on the device lane need none, kept the copy behind the forward",
        how="the copy waits for the last launch, on its own stream",
        upstream="none known; `load_fence_stream` is for the other direction",
        plan="goes when upstream orders the copy behind the forward",
        unless=unless,
    )


def _loads(target: str, unless: str | None = None) -> Patch:
    return Patch(
        target=f"{target}.start_loading",
        wrapper=start_loading,
        why="pages that an abort has freed may still be written by a forward; only waits of the schedule "
        "stream kept the load behind it",
        how="up to 0.5.18 the load waits for the last launch, on its own stream",
        upstream="`load_fence_stream`, from 0.5.19 on",
        plan="goes with 0.5.18",
        unless=unless,
    )


_ENGINE = "sglang.srt.mem_cache.l2_transfer:L2TransferEngine.submit_device_to_host"  # from 0.5.18 on

PATCHES = (
    _synchronised(_UNIFIED),
    _synchronised(_HIRADIX, optional=True),  # up to 0.5.20
    Patch(
        target=f"{_UNIFIED}._sync_hicache_ready_counts",
        wrapper=sync_ready_counts,
        why="a later stage waits in its scheduler for copies and storage operations that have finished on "
        "stage 0 only: a slow or dead storage of one stage stops all requests",
        how="later stages report what has finished, and stage 0 decides on the least",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=True,  # from 0.5.17 on; effective from 0.5.19 on
        relies_on=(
            f"{_UNIFIED}._drain_storage_control_queues_impl",
            f"{_UNIFIED}._count_ready_acks",
        ),
    ),
    Patch(
        target=f"{_UNIFIED}._all_reduce",
        wrapper=all_reduce,
        why="the numbers are made and reduced in one function",
        how="lowers stage 0's before the reduction",
        upstream=_UPSTREAM,
        plan=_PLAN,
    ),
    _writes(_CONTROLLER),
    _writes(_HYBRID, unless=_ENGINE),
    _loads(_CONTROLLER),
    _loads(_HYBRID, unless=_ENGINE),
)
