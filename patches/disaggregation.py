"""Seam: the KV chunks of a prefill server, from the launch that writes them to the transfer engine.

Upstream sends a chunk in the next iteration, behind everything for which this one waits, and what is left
of a prompt when its first token has come back. What keeps the engine from reading too early is an accident:
the scheduler has waited for the forward in the meantime, to send proxies and to read page numbers. Here a
chunk is queued right behind its launch, with the event of that launch and a copy of its page numbers on its
way, and the engine's thread waits for both.

Not layer by layer: the engines of SGLang (Mooncake, and Ascend's, which derives from it) take a chunk of
all layers of the stage as one transfer, and a forward has one event.
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
    """As it is now: 0.5.20 and later can change the role of a running server."""
    return str(getattr(scheduler.disaggregation_mode, "value", scheduler.disaggregation_mode)) != "null"


def send_launched_chunks(scheduler: Any, pipeline: AsyncPipeline, batch: Any, launched: Any) -> None:
    """Queue what the forward that was just launched writes, as far as it can be sent already.

    `launched`: the event behind that forward. Every stage does the same for the same requests, whatever
    its own transfers do, so that the prefix caches of the stages stay equal.
    """
    from sglang.srt.disaggregation.utils import DisaggregationMode

    if scheduler.disaggregation_mode != DisaggregationMode.PREFILL:
        return
    pipeline.last_launched = launched
    for req in batch.reqs:
        setattr(req, _LAUNCHED, launched)
    if not _can_send_early(scheduler):
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
    """What a request sends last, its own forwards have written; what it sends before may be the prefix that
    it shares with a request that has just been launched."""
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
    """From 0.5.21 on the part of `send_kv_chunk` behind its checksum."""
    _with_late_indices(original, current(), req)(scheduler, req, last_chunk, end_idx)


def put(original: Any, queue: Any, item: Any) -> None:
    current().transfers.queued(item)
    original(queue, item)


def get(original: Any, queue: Any) -> Any:
    item = original(queue)
    current().transfers.taken(item)
    return item


def _can_send_early(scheduler: Any) -> bool:
    """Equal on all ranks. 0.5.15 cannot take the step of one chunk alone; staging sends by a grid of its own.
    A hierarchical cache copies what is in the tree to the host, and a model with state besides its KV (Mamba,
    sliding windows) copies that into the tree: neither may happen before it is computed."""
    parameters = inspect.signature(scheduler.process_prefill_chunk).parameters
    return (
        "last_batch" in parameters
        and not scheduler.enable_staging
        and not scheduler.enable_hierarchical_cache
        and not scheduler.disagg_prefill_bootstrap_queue.kv_manager.kv_args.state_types
    )


def _has_queue(req: Any) -> bool:
    """Whether a thread of the engine takes the chunks of this request from a queue, and can wait there."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender

    return isinstance(req.disagg_kv_sender, MooncakeKVSender)  # Ascend's derives from it


def _send_whole_pages(scheduler: Any, req: Any) -> None:
    """Everything but the last page, with which upstream sends the first token when it is known.

    Into the prefix cache first, as upstream does before it sends: pages that another request has computed as
    well are freed there, and must not be read any more.
    """
    _cache(scheduler, req)
    page_size = scheduler.token_to_kv_pool_allocator.page_size
    whole = (len(req.origin_input_ids) - 1) // page_size * page_size
    scheduler.send_kv_chunk(req, last_chunk=False, end_idx=whole)


def _cache(scheduler: Any, req: Any) -> None:
    """As the release does it where the result of a prefill is processed."""
    for name in ("checkpoint_disagg_prefill", "cache_unfinished_disagg_prefill"):  # 0.5.22, 0.5.21
        if (cache := getattr(scheduler, name, None)) is not None:
            cache(req)
            return
    from sglang.srt.mem_cache.common import maybe_cache_unfinished_req

    maybe_cache_unfinished_req(req, scheduler.tree_cache)


def _with_late_indices(function: Any, pipeline: AsyncPipeline, req: Any) -> Any:
    """The function, copying page numbers without waiting for them."""
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
        why="nothing but earlier waits of the scheduler keeps a chunk from being read before it is computed",
        how="ties the event of the launch to what is queued; page numbers are copied without waiting",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_MIXIN}.process_prefill_chunk",
            f"{_MIXIN}.process_batch_result_disagg_prefill",
            f"{_MIXIN}.maybe_send_cached_prefix_chunk",
            "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin.event_loop_pp_disagg_prefill",
        ),
    ),
    Patch(
        target=f"{_MIXIN}._send_kv_chunk",
        wrapper=send_kv_chunk_inside,
        why="the scheduler waits for the page numbers of the chunk",
        how="they are copied to pinned memory and waited for where they are used",
        upstream=_UPSTREAM,
        plan=_PLAN,
        optional=True,
    ),
    Patch(
        target=f"{_QUEUE}.put",
        wrapper=put,
        why="a queued chunk does not say when it is computed",
        how="gives it the event",
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
        why="the thread of the engine reads a chunk as soon as it has it",
        how="waits for the event first",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(f"{_MOONCAKE}:MooncakeKVManager.transfer_worker",),
    ),
)
