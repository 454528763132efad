"""Seam: KV chunks of a prefill server, from launch to transfer engine.

Upstream queues a chunk in the next iteration, and a prompt's rest with its first token: the scheduler has
then waited for the forward. Here a chunk is queued right after its launch, with its event and an asynchronous
copy of its page numbers; the engine's thread waits for both.

Not layer by layer: SGLang's engines (Mooncake, Ascend's derived one) transfer all layers of the stage at
once.
"""

from __future__ import annotations

import inspect
from typing import Any

from sglang_npu_pp.patching import Patch, with_names
from sglang_npu_pp.transfer_gate import LateIndices

from .pipeline import AsyncPipeline, current

_MIXIN = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin"
_QUEUE = "sglang.srt.disaggregation.common.utils:FastQueue"
_LAUNCHED = "sglang_npu_pp_launched"  # attribute of a request: event of its last launch


def is_disaggregated(scheduler: Any) -> bool:
    """At present: from 0.5.20 on the role can change."""
    return _role(scheduler) != "null"


def is_prefill_server(scheduler: Any) -> bool:
    """At present, as well."""
    return _role(scheduler) == "prefill"


def _role(scheduler: Any) -> str:
    return str(getattr(scheduler.disaggregation_mode, "value", scheduler.disaggregation_mode))


def send_launched_chunks(scheduler: Any, pipeline: AsyncPipeline, batch: Any, launched: Any) -> None:
    """Queue the sendable part of the forward just launched.

    `launched`: the event after it. Equal on all stages, whatever their transfers do, for equal prefix caches.
    """
    pipeline.last_launched = launched
    if not is_prefill_server(scheduler):
        return
    for req in batch.reqs:
        setattr(req, _LAUNCHED, launched)
    if not (pipeline.early_send and _can_send_early(scheduler)):
        return
    for req in batch.reqs:
        if req.pending_bootstrap or not _has_queue(req):
            continue
        if req is scheduler.chunked_req:
            # Upstream's own step, which it repeats in the next iteration and then finds nothing to do.
            scheduler.process_prefill_chunk(last_batch=None, running_batch=scheduler.running_batch)
        else:
            _send_whole_pages(scheduler, req)


def send_kv_chunk(
    original: Any, scheduler: Any, req: Any, last_chunk: bool = False, end_idx: Any = None
) -> None:
    """The last chunk waits for this request's last forward; earlier ones for the current launch, whose prefix
    they may share."""
    pipeline = current()
    written = pipeline.last_launched
    if written is None:
        original(scheduler, req, last_chunk, end_idx)
        return
    if last_chunk:
        written = getattr(req, _LAUNCHED, written)
    with pipeline.transfers.behind(written):
        _with_late_indices(original, pipeline, req)(scheduler, req, last_chunk, end_idx)


def send_kv_chunk_inside(
    original: Any, scheduler: Any, req: Any, last_chunk: bool = False, end_idx: Any = None
) -> None:
    """From 0.5.21 on: `send_kv_chunk` without its checksum."""
    _with_late_indices(original, current(), req)(scheduler, req, last_chunk, end_idx)


def put(original: Any, queue: Any, item: Any) -> None:
    current().transfers.queued(item)
    original(queue, item)


def get(original: Any, queue: Any) -> Any:
    item = original(queue)
    current().transfers.taken(item)
    return item


def _can_send_early(scheduler: Any) -> bool:
    """Equal on all ranks. Not up to 0.5.15.post1 (no step for one chunk), with staging buffers (their own
    grid), or where the prefix tree must not hold uncomputed KV: with a hierarchical cache (copied to the
    host) or further state (Mamba, sliding windows; copied into the tree)."""
    parameters = inspect.signature(scheduler.process_prefill_chunk).parameters
    return (
        "last_batch" in parameters
        and not scheduler.enable_staging
        and not scheduler.enable_hierarchical_cache
        and not scheduler.disagg_prefill_bootstrap_queue.kv_manager.kv_args.state_types
    )


def _has_queue(req: Any) -> bool:
    """Whether an engine thread takes this request's chunks from a queue, where it can wait."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    return isinstance(req.disagg_kv_sender, MooncakeKVSender)  # Ascend's derives from it


def _send_whole_pages(scheduler: Any, req: Any) -> None:
    """All but the last page, which upstream sends with the first token.

    Into the prefix cache first, as upstream: that frees pages also computed by another request.
    """
    _cache(scheduler, req)
    page_size = scheduler.token_to_kv_pool_allocator.page_size
    whole = (len(req.origin_input_ids) - 1) // page_size * page_size
    scheduler.send_kv_chunk(req, last_chunk=False, end_idx=whole)


def _cache(scheduler: Any, req: Any) -> None:
    """As the release does it when processing a prefill's result."""
    for name in ("checkpoint_disagg_prefill", "cache_unfinished_disagg_prefill"):  # 0.5.22, 0.5.21
        if (cache := getattr(scheduler, name, None)) is not None:
            cache(req)
            return
    from sglang.srt.mem_cache.common import maybe_cache_unfinished_req

    maybe_cache_unfinished_req(req, scheduler.tree_cache)


def _with_late_indices(function: Any, pipeline: AsyncPipeline, req: Any) -> Any:
    """The function, with asynchronous copies of page numbers."""
    if not pipeline.streams.asynchronous or not _has_queue(req):
        return function

    def kv_to_page_indices(kv_indices: Any, page_size: int) -> LateIndices:
        return LateIndices(kv_indices[::page_size] // page_size, pipeline.streams)

    return with_names(function, kv_to_page_indices=kv_to_page_indices)


_MOONCAKE = "sglang.srt.disaggregation.mooncake.conn"
_UPSTREAM = "vllm-ascend #5303 (a chunk when it is computed); 0.5.22 and 0.5.23 wait for events in the worker"
_PLAN = "goes when upstream sends a chunk behind its launch"

PATCHES = (
    Patch(
        target=f"{_MIXIN}.send_kv_chunk",
        wrapper=send_kv_chunk,
        why="only earlier waits of the scheduler keep the engine from reading an uncomputed chunk",
        how="attaches the launch's event to the queued chunk; page numbers are copied without waiting",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_MIXIN}.process_prefill_chunk",
            f"{_MIXIN}.process_batch_result_disagg_prefill",
            f"{_MIXIN}.maybe_send_cached_prefix_chunk",
            "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin.event_loop_pp_disagg_prefill",
            "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin.event_loop_pp_disagg_decode",
        ),
    ),
    Patch(
        target=f"{_MIXIN}._send_kv_chunk",
        wrapper=send_kv_chunk_inside,
        why="the scheduler waits for the page numbers of the chunk",
        how="they are copied to pinned memory; the wait is at their use",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=True,
    ),
    Patch(
        target=f"{_QUEUE}.put",
        wrapper=put,
        why="a queued chunk carries no event of its forward",
        how="attaches the event",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_MOONCAKE}:MooncakeKVManager.add_transfer_request",
            "sglang.srt.disaggregation.common.conn:CommonKVSender._prepare_send_indices",
        ),
    ),
    Patch(
        target=f"{_QUEUE}.get",
        wrapper=get,
        why="the engine's thread reads a chunk at once",
        how="waits for the event first",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(f"{_MOONCAKE}:MooncakeKVManager.transfer_worker",),
    ),
)
