"""Seam: proxy tensors of a microbatch, from stage to stage.

Upstream receives them one by one before the launch and sends them at the end of the iteration, behind another
microbatch's results. Here the receive is posted there, waited for just before the forward, and the send right
behind it, as of outputs (last stage) and KV chunks (prefill server).

`SGLANG_NPU_PP_EARLY_SEND=0` sends proxies at upstream's place, in the same order on the device lane. No
circle of waits forms: a stage waits for messages of this iteration of earlier stages (requests, proxies) and
of earlier iterations (outputs, consensus), and sends all of an iteration before the next.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.host_copies import HostCopy, copy_to_host
from sglang_npu_pp.observe.stage_times import DepthAdviser
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.transport.stage_link import Pending

from .disaggregation import send_launched_chunks
from .forwards import Incoming
from .hidden_states import add_hidden_states
from .pipeline import AsyncPipeline, Launch, current, forward_stream

logger = logging.getLogger("sglang_npu_pp")

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"


def recv_proxy_tensors(original: Any, scheduler: Any) -> Any:
    """A pending value, read by `launch_batch` only."""
    pipeline = current()
    return None if pipeline.link.stage == 0 else pipeline.post_proxies()


def launch_batch(original: Any, scheduler: Any, mb_id: int, *arguments: Any) -> tuple[Any, Any]:
    """`arguments` end alike in all releases; from 0.5.16 on the batch comes first."""
    pipeline = current()
    *given, proxies, mb_metadata, last_rank_comm_queue = arguments
    microbatch = _Microbatch.of(scheduler.mbs[mb_id])
    with _Launching(scheduler, pipeline, mb_id, microbatch) as launching:
        proxies = launching.proxies(proxies)
        result, launched = original(scheduler, mb_id, *given, proxies, mb_metadata, last_rank_comm_queue)
    outputs = None
    if pipeline.is_last:
        pipeline.link.release(launched)  # the proxies are used up once that event has passed
        outputs = _return_outputs(
            scheduler, pipeline, mb_id, microbatch, result, last_rank_comm_queue.pop()[1]
        )
    elif not microbatch.prebuilt:
        pipeline.unsent = functools.partial(_send_proxies, scheduler, pipeline, microbatch.words, result)
        if pipeline.early_send:
            pipeline.send_unsent()
    pipeline.launched[mb_id] = Launch(pipeline.iteration, microbatch.skipped, outputs)
    send_launched_chunks(scheduler, pipeline, microbatch.batch, launched)
    if pipeline.ahead is not None:
        pipeline.ahead.behind_launch()
    return result, launched


def send_dict_to_next_stage(original: Any, scheduler: Any, *arguments: Any, **options: Any) -> list[Any]:
    """The proxies, unless `launch_batch` has sent them."""
    current().send_unsent()
    return []


# --- the steps of a launch ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Microbatch:
    """A batch at its launch."""

    batch: Any  # SGLang's
    prebuilt: bool  # a decode server's, whose prefill another server has run: nothing is computed
    skipped: bool  # its outputs are placeholders on every stage, and do not travel
    words: str  # which requests it has, see `describe`

    @classmethod
    def of(cls, batch: Any) -> _Microbatch:
        from sglang.srt.managers.scheduler_pp_mixin import _pp_can_skip_output_comm

        prebuilt = batch.forward_mode.is_prebuilt()
        return cls(batch, prebuilt, prebuilt or _pp_can_skip_output_comm(batch), describe(batch))


def describe(batch: Any) -> str:
    """The requests of a microbatch, comparable between stages: "decode of 3 requests, 3 tokens (5f3a9c01)",
    with a CRC-32 of the ids in order.

    Sent with proxies: after unequal decisions (abort, time limit, grammar) upstream computed on other
    requests' rows, or hung.
    """
    names = [request.rid for request in batch.reqs]
    mode = batch.forward_mode
    tokens = batch.extend_num_tokens if mode.is_extend() else len(names)
    digest = zlib.crc32("\n".join(names).encode())
    return f"{mode.name.lower()} of {len(names)} requests, {tokens} tokens ({digest:08x})"


class _Launching(ExitStack):
    """Around upstream's launch, which begins when its proxies are there."""

    def __init__(self, scheduler: Any, pipeline: AsyncPipeline, slot: int, microbatch: _Microbatch) -> None:
        super().__init__()
        self._scheduler, self._pipeline = scheduler, pipeline
        self._slot, self._microbatch = slot, microbatch
        self._incoming: Incoming | None = None

    def proxies(self, pending: Any) -> Any:
        """For the launch: those that are there, or are waited for when all else is ready."""
        wait = functools.partial(self._begin, pending)
        if isinstance(pending, Pending) and self._pipeline.waits_last and not self._microbatch.prebuilt:
            self._incoming = Incoming(wait)
            return self._incoming
        return wait()

    def _begin(self, pending: Any) -> Any:
        scheduler, pipeline = self._scheduler, self._pipeline
        proxies = _wait_for_proxies(scheduler, pending, self._microbatch.words)
        _decide_what_was_put_off(pipeline)
        self.enter_context(_timed(scheduler, pipeline, self._slot, counted=not self._microbatch.skipped))
        return proxies

    def __exit__(self, kind: Any, *details: Any) -> Any:
        if kind is None and self._incoming is not None and not self._incoming.taken:
            where = self._pipeline.link.context.where
            raise PipelineError(
                f"{where}: SGLang ran a {self._microbatch.words} without its proxies, so its tokens would be "
                "wrong; start the server with SGLANG_NPU_PP_AHEAD=0 and report this."
            )
        return super().__exit__(kind, *details)


def _wait_for_proxies(scheduler: Any, pending: Any, batch: str) -> Any:
    """`pending` itself on the first stage."""
    if not isinstance(pending, Pending):
        return pending
    pending.batch = batch
    from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

    with forward_stream(scheduler):
        return PPProxyTensors(pending.wait(_gather_group(scheduler)))


def _gather_group(scheduler: Any) -> Any:
    """Ranks with equal proxies; None for context-parallel prefill up to 0.5.18 (later groups of one)."""
    return scheduler.attn_tp_group if getattr(scheduler, "require_attn_tp_allgather", True) else None


def _decide_what_was_put_off(pipeline: AsyncPipeline) -> None:
    """With data-parallel attention: decide by the other ranks' rows."""
    if pipeline.metadata is not None:
        pipeline.metadata.finish()


@contextmanager
def _timed(scheduler: Any, pipeline: AsyncPipeline, slot: int, counted: bool) -> Iterator[None]:
    """Around a launch: telemetry, trace, and at first depth advice.

    `counted`: the batch has outputs to wait for.
    """
    trace, stream = pipeline.link.trace, forward_stream(scheduler)
    trace.record("launch", "", slot, pipeline.iteration)
    with pipeline.link.telemetry.phase("forward"):
        if pipeline.adviser is not None:
            with stream:
                pipeline.adviser.begin(_kind(scheduler, slot) if counted else "skipped", pipeline.iteration)
        with pipeline.timing(stream, slot):
            yield
        if pipeline.adviser is not None:
            with stream:
                pipeline.adviser.end()
            _say_advice(scheduler, pipeline, pipeline.adviser)
    trace.record("launched", "", slot, pipeline.iteration)


def _kind(scheduler: Any, slot: int) -> str:
    mode = scheduler.mbs[slot].forward_mode
    return "decode" if mode.is_decode() else "prefill" if mode.is_extend() else mode.name


def _say_advice(scheduler: Any, pipeline: AsyncPipeline, adviser: DepthAdviser) -> None:
    """Once, when all is measured; on stage 0."""
    if not adviser.finished:
        return
    pipeline.adviser = None
    if pipeline.link.stage == 0:
        limit = scheduler.server_args.pp_max_micro_batch_size
        logger.info("sglang-npu-pp: %s", adviser.advice(scheduler.max_running_requests, limit))


def _send_proxies(scheduler: Any, pipeline: AsyncPipeline, batch: str, result: Any) -> None:
    """On the forward stream: the next forward may overwrite packed tensors."""
    with forward_stream(scheduler):
        proxies = result.pp_hidden_states_proxy_tensors.tensors
        pipeline.send_proxies(proxies, batch, _gather_group(scheduler))
        # Behind the packing: a tensor that is sent may be the received one, changed in place.
        pipeline.link.release(pipeline.streams.record())


def _return_outputs(
    scheduler: Any, pipeline: AsyncPipeline, slot: int, microbatch: _Microbatch, result: Any, outputs: Any
) -> HostCopy | None:
    """Last stage: copy outputs to the host, send them. None if skipped."""
    if microbatch.skipped:
        return None
    add_hidden_states(scheduler, microbatch.batch, result, outputs.tensors)
    with torch.profiler.record_function("send_res_dict_to_next_stage"):  # upstream's name in profiles
        with forward_stream(scheduler):
            produced = pipeline.streams.record()  # upstream packs outputs behind its own event
        copy = copy_to_host(outputs.tensors, pipeline.streams, scheduler.copy_stream, produced)
        assert pipeline.token_return is not None
        pipeline.token_return.post(copy, slot, pipeline.iteration)
    return copy


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
        how="does nothing; with SGLANG_NPU_PP_EARLY_SEND=0 it sends them on the lanes",
        upstream="sglang #19582",
        plan=_PLAN,
        relies_on=(f"{_MIXIN}._pp_send_proxy_to_next_stage",),
    ),
)
