"""Seam: the proxy tensors of a microbatch, from stage to stage.

Upstream receives them tensor by tensor before the launch and sends them at the end of the iteration, after
another microbatch's results were waited for and processed. Here the receive is posted where upstream
receives, waited for as the last thing before the forward, and the send is posted as the first thing
behind it. The outputs of the last stage leave at the same place, and the KV chunks of a prefill server.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.token_return import copy_to_host
from sglang_npu_pp.transport.stage_link import Pending

from .disaggregation import send_launched_chunks
from .measuring import measured
from .microbatch import describe
from .pipeline import AsyncPipeline, Launch, current

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"


def recv_proxy_tensors(original: Any, scheduler: Any) -> Any:
    """A pending value in the place of the tensors; only `launch_batch` reads it."""
    pipeline = current()
    if pipeline is None:
        return original(scheduler)
    return None if pipeline.link.stage == 0 else pipeline.post_proxies()


def launch_batch(original: Any, scheduler: Any, mb_id: int, *arguments: Any) -> tuple[Any, Any]:
    """The last arguments are equal in all releases; before them 0.5.18 and later pass the batch as well."""
    pipeline = current()
    if pipeline is None:
        return original(scheduler, mb_id, *arguments)
    *given, pp_proxy_tensors, mb_metadata, last_rank_comm_queue = arguments
    cur_batch = scheduler.mbs[mb_id]
    from sglang.srt.managers.scheduler_pp_mixin import _pp_can_skip_output_comm

    prebuilt = cur_batch.forward_mode.is_prebuilt()
    skipped = prebuilt or _pp_can_skip_output_comm(cur_batch)
    batch = describe(cur_batch)
    proxies = _wait_for_proxies(scheduler, pp_proxy_tensors, batch)
    if pipeline.metadata is not None:
        pipeline.metadata.finish()
    trace = pipeline.link.trace
    trace.record("launch", "", mb_id, pipeline.iteration)
    with (
        pipeline.link.telemetry.phase("forward"),
        measured(scheduler, pipeline, mb_id, counted=not skipped),
    ):
        result, launched = original(scheduler, mb_id, *given, proxies, mb_metadata, last_rank_comm_queue)
    trace.record("launched", "", mb_id, pipeline.iteration)
    outputs = last_rank_comm_queue.pop()[1].tensors if pipeline.is_last else None
    pipeline.launched[mb_id] = Launch(pipeline.iteration, skipped, outputs)
    pipeline.link.release(launched)
    if pipeline.is_last:
        if not skipped:
            _return_tokens(scheduler, pipeline, mb_id)
    elif not prebuilt:
        # On the forward stream: the next forward may overwrite the tensors once they are packed.
        with scheduler.forward_stream_ctx:
            proxies_out = result.pp_hidden_states_proxy_tensors.tensors
            pipeline.send_proxies(proxies_out, batch, _gather_group(scheduler))
    send_launched_chunks(scheduler, pipeline, cur_batch, launched)
    return result, launched


def send_dict_to_next_stage(original: Any, scheduler: Any, *arguments: Any, **options: Any) -> list[Any]:
    """Proxies only, since outputs do not travel from stage to stage: `launch_batch` has sent them."""
    return original(scheduler, *arguments, **options) if current() is None else []


def _wait_for_proxies(scheduler: Any, pending: Any, batch: str) -> Any:
    """Nothing is done between this wait and the forward."""
    if not isinstance(pending, Pending):
        return pending
    pending.batch = batch
    from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

    with scheduler.forward_stream_ctx:
        return PPProxyTensors(pending.wait(_gather_group(scheduler)))


def _gather_group(scheduler: Any) -> Any:
    """Ranks that hold equal proxies. Up to 0.5.18 those of a context-parallel prefill do not, and upstream
    says so here; later its attention groups have one rank then."""
    return scheduler.attn_tp_group if getattr(scheduler, "require_attn_tp_allgather", True) else None


def _return_tokens(scheduler: Any, pipeline: AsyncPipeline, mb_id: int) -> None:
    assert pipeline.token_return is not None
    launch = pipeline.launched[mb_id]
    assert launch.device_outputs is not None
    with torch.profiler.record_function("send_res_dict_to_next_stage"):  # upstream's name in profiles
        with scheduler.forward_stream_ctx:
            produced = pipeline.streams.record()  # upstream packs outputs behind its own event
        copy = copy_to_host(launch.device_outputs, pipeline.streams, scheduler.copy_stream, produced)
        pipeline.token_return.post(copy, mb_id, launch.iteration)


_PLAN = "goes when upstream has split phases (sglang #19582) and sends right after the launch"

PATCHES = (
    Patch(
        target=f"{_MIXIN}._pp_recv_proxy_tensors",
        wrapper=recv_proxy_tensors,
        why="size, pickle and every tensor are waited for one after another, before anything else",
        how="post the receive and return a pending value",
        upstream="sglang #19582; vllm-ascend #7143 (there the wait hides in attribute access)",
        plan=_PLAN,
        relies_on=(f"{_MIXIN}._pp_commit_proxy_send_work", f"{_MIXIN}._pp_commit_comm_work"),
    ),
    Patch(
        target=f"{_MIXIN}._pp_launch_batch",
        wrapper=launch_batch,
        why="proxies leave at the end of the iteration, outputs when their microbatch comes round",
        how="wait for the proxies, launch, then send proxies or outputs at once",
        upstream="sglang #19582; Ascend ring deadlocks sglang #23472, #30844",
        plan=_PLAN,
        relies_on=(
            f"{_MIXIN}._pp_prepare_tensor_dict",
            f"{_MIXIN}._pp_wait_forward_dependencies",
            "sglang.srt.managers.scheduler_pp_mixin:_pp_can_skip_output_comm",
        ),
    ),
    Patch(
        target=f"{_MIXIN}._pp_send_dict_to_next_stage",
        wrapper=send_dict_to_next_stage,
        why="would send the proxies a second time",
        how="does nothing",
        upstream="sglang #19582",
        plan=_PLAN,
        relies_on=(f"{_MIXIN}._pp_send_proxy_to_next_stage",),
    ),
)
