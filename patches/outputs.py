"""Seam: sampled token ids and logprobs, from the last stage to every stage.

Upstream passes device tensors around the ring inside the loop and reads them with `tolist()`. Here the last
stage sends on the host lane. A ticket replaces upstream's event: its `synchronize()`, called by all three
loops behind the launch, waits and builds the batch result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sglang_npu_pp.host_copies import upload
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.streams import PassedEvent

from . import speculation
from .disaggregation import is_prefill_server
from .hidden_states import give_hidden_states
from .pipeline import AsyncPipeline, Launch, current

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer:SchedulerOutputStreamer"

# Outputs that later work reads on the device; everything else is only read on the host.
_DEVICE_OUTPUTS = ("draft_", "__sampling_observer_output__.", *speculation.DEVICE_OUTPUTS)


class OutputTicket:
    """Outputs of one microbatch in flight, in place of upstream's `d2h_event`; `synchronize()` fills
    `result`."""

    def __init__(self, scheduler: Any, pipeline: AsyncPipeline, slot: int, batch: Any, metadata: Any) -> None:
        from sglang.srt.managers.utils import GenerationBatchResult

        self._scheduler, self._pipeline = scheduler, pipeline
        self._slot, self._batch, self._metadata = slot, batch, metadata
        self._launch = pipeline.launched[slot]
        self._pending = None if pipeline.is_last else pipeline.post_outputs(slot)
        self.result = GenerationBatchResult()

    def synchronize(self) -> None:
        """Wait for the outputs; fill `result`."""
        ahead = self._pipeline.ahead
        if ahead is not None:
            ahead.prepare(self._batch, self._slot)
        values = self._wait()
        if self._pipeline.adviser is not None:
            self._pipeline.adviser.arrived()
        if ahead is not None:
            ahead.check(values["next_token_ids"].tolist())
        prepared = _prepare_result(self._scheduler, self._batch, self._metadata, values, self)
        if getattr(prepared, "auxiliary_host_output", None) is not None:  # 0.5.20 and later
            # Upstream copies it from the device behind its preparation, and waits for that, too.
            self._pipeline.streams.record().synchronize()
        prepared.next_token_ids = values["next_token_ids"]  # on the host: `tolist()` does not block
        vars(self.result).update(vars(prepared))

    def on_device(self, name: str, value: Any) -> Any:
        """The device tensor of an output; on the last stage the original."""
        own = self._launch.outputs
        return upload(value, self._pipeline.streams) if own is None else own.sources[name]

    def _wait(self) -> Mapping[str, Any]:
        with torch.profiler.record_function("recv_res_dict_from_prev_stage"):  # upstream's name in profiles
            if self._pending is not None:
                return self._pending.wait()
            token_return, own = self._pipeline.token_return, self._launch.outputs
            assert token_return is not None
            assert own is not None
            return token_return.wait(own, self._launch.iteration)


def exchange_outputs(
    original: Any,
    scheduler: Any,
    next_first_rank_mb_id: int,
    next_mb_id: int,
    mbs: list[Any],
    mb_metadata: list[Any],
    last_rank_comm_queue: Any,
    pp_outputs: Any,
) -> tuple[Any, Any, Any, list[Any]]:
    """Post the receive of `next_mb_id`'s outputs; no forwarding, no waiting."""
    pipeline = current()
    batch, metadata = mbs[next_mb_id], mb_metadata[next_mb_id]
    if batch is None or batch.forward_mode.is_prebuilt():
        return None, None, None, []
    launch: Launch = pipeline.launched[next_mb_id]
    if launch.skipped:
        _, result, _ = scheduler._pp_make_skip_output_result(batch, metadata)
        result.next_token_ids = torch.zeros(len(batch.reqs), dtype=torch.int64)
        give_hidden_states(batch, result, {})
        return None, result, PassedEvent(), []
    ticket = OutputTicket(scheduler, pipeline, next_mb_id, batch, metadata)
    return None, ticket.result, ticket, []


def _prepare_result(
    scheduler: Any, batch: Any, metadata: Any, values: Mapping[str, Any], ticket: OutputTicket
) -> Any:
    """Upstream's preparation, with device tensors where needed."""
    from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

    on_device = (
        _DEVICE_OUTPUTS if speculation.is_verify_round(values) else ("next_token_ids", *_DEVICE_OUTPUTS)
    )
    outputs = {
        name: ticket.on_device(name, value) if name.startswith(on_device) else value
        for name, value in values.items()
    }
    result = scheduler._pp_prep_batch_result(batch, metadata, PPProxyTensors(outputs))
    speculation.put_lengths_on_device(batch, result, outputs, ticket.on_device)
    if speculation.has_proposal(values) and is_prefill_server(scheduler):
        speculation.leave_proposal_on_host(result, values)
    give_hidden_states(batch, result, values)
    return result


def stream_output(original: Any, streamer: Any, reqs: list[Any], *arguments: Any, **options: Any) -> None:
    """Later stages, without a detokenizer, only mark finished requests."""
    if current().link.stage > 0:
        reqs = [request for request in reqs if request.finished()]
        if not reqs:
            return
    original(streamer, reqs, *arguments, **options)


PATCHES = (
    Patch(
        target=f"{_MIXIN}._pp_send_recv_and_preprocess_output_tensors",
        wrapper=exchange_outputs,
        why="outputs travel pp_size - 1 hops as device tensors and each hop blocks the scheduler; on "
        "Ascend the ring of rendezvous sends deadlocks or needs a paired batch",
        how="outputs come from the last stage directly; a ticket is waited for behind the launch",
        upstream="vllm-ascend #2788, vllm #51650, sglang #23472, #30844",
        plan="goes when upstream returns tokens on the host without a ring",
        relies_on=(
            f"{_MIXIN}._pp_commit_send_output_work_and_preprocess_output_tensors",
            f"{_MIXIN}._pp_prep_batch_result",
            f"{_MIXIN}._pp_make_skip_output_result",
            "sglang.srt.managers.scheduler_pp_mixin:_pp_exchange_outputs_before_forward",
            "sglang.srt.managers.utils:get_logprob_from_pp_outputs",
            "sglang.srt.managers.utils:get_logprob_dict_from_result",
        ),
    ),
    Patch(
        target=f"{_STREAMER}.stream_output",
        wrapper=stream_output,
        why="every stage collects each step's tokens, offsets and statistics for the detokenizer, which only "
        "stage 0 has: a tenth of what an iteration costs the scheduler of a later stage",
        how="later stages stream finished requests only",
        upstream="none known",
        plan="goes when upstream streams where the detokenizer is",
        relies_on=("sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels.create",),
    ),
)
