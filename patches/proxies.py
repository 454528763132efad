"""Seam: the proxy tensors of a microbatch, from stage to stage.

Upstream receives them tensor by tensor before the launch and sends them at the end of the iteration, after
another microbatch's results were waited for and processed. Here the receive is posted where upstream
receives, waited for as the last thing before the forward, and the send is posted as the first thing
behind it. The outputs of the last stage leave at the same place.

The last thing before the forward is the end of `ForwardBatch.init_new`, not the launch: a launch begins with
upstream's preparation of the batch, which needs no proxies. So the host prepares while they are on the way,
and on an accelerator nothing that it prepares stands behind them on the forward stream.

`ModelRunner.forward` would be the natural seam, but its module must not be imported before a scheduler needs
it: on an NPU that import replaces parts of torch, and most models cannot be imported after it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.token_return import copy_to_host
from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.stage_link import Pending

from .measuring import measured
from .microbatch import describe
from .pipeline import AsyncPipeline, Launch, current

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"
_PREPARE = "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new"


def recv_proxy_tensors(original: Any, scheduler: Any) -> Any:
    """A pending value in the place of the tensors; `launch_batch` passes it on to the forward."""
    pipeline = current()
    if pipeline is None:
        return original(scheduler)
    return None if pipeline.link.stage == 0 else pipeline.post_proxies()


class ComingProxies:
    """The proxies of one microbatch, on every stage. `tensors` is what the forward gets: upstream's object,
    None on stage 0; it is empty until they `arrive`."""

    def __init__(
        self,
        scheduler: Any,
        pipeline: AsyncPipeline,
        slot: int,
        pending: Pending | None,
        batch: str,
        measure: AbstractContextManager[None],
    ) -> None:
        from sglang.srt.model_executor.forward_batch_info import PPProxyTensors

        self._scheduler, self._pipeline, self._slot = scheduler, pipeline, slot
        self._pending, self._begun, self._measure = pending, False, measure
        self.forward = ExitStack()
        """Open around the launch; holds what measures the forward, from the arrival on."""
        self.read_by_forward: list[Any] = []
        self.tensors: Any = None
        if pending is not None:
            pending.batch = batch
            self.tensors = PPProxyTensors({})

    def arrive(self) -> None:
        """Wait for them, the first time, as the last thing before the forward.

        A fixed point of the program on all ranks of a stage, so slices may be gathered here.
        """
        if self._begun:
            return
        self._begun = True
        if self._pending is not None:
            with self._scheduler.forward_stream_ctx:
                self.tensors.tensors = self._pending.wait(_gather_group(self._scheduler))
        self._pipeline.link.trace.record("launch", "", self._slot, self._pipeline.iteration)
        self.forward.enter_context(self._measure)


def prepare_batch(original: Any, kind: Any, *arguments: Any, **options: Any) -> Any:
    """Upstream's preparation of a forward; what is launched next is the forward."""
    forward_batch = original(kind, *arguments, **options)
    pipeline = current()
    if pipeline is not None and pipeline.launching is not None:
        pipeline.launching.read_by_forward += _parts(forward_batch)
        pipeline.launching.arrive()
    return forward_batch


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
    measure = measured(scheduler, pipeline, mb_id, counted=not skipped)
    proxies = ComingProxies(scheduler, pipeline, mb_id, pp_proxy_tensors, batch, measure)
    pipeline.launching = proxies
    telemetry, trace = pipeline.link.telemetry, pipeline.link.trace
    trace.record("prepare", "", mb_id, pipeline.iteration)
    with telemetry.phase("forward", apart_from=telemetry.receiving(Kind.PROXY.label)), proxies.forward:
        result, launched = original(
            scheduler, mb_id, *given, proxies.tensors, mb_metadata, last_rank_comm_queue
        )
        proxies.arrive()  # nothing, unless the batch had no forward
    pipeline.launching = None
    pipeline.keep_until(launched, proxies.read_by_forward)
    trace.record("launched", "", mb_id, pipeline.iteration)
    outputs = last_rank_comm_queue.pop()[1].tensors if pipeline.is_last else None
    pipeline.launched[mb_id] = Launch(pipeline.iteration, skipped, outputs)
    pipeline.link.release(launched)
    if pipeline.is_last:
        if not skipped:
            _return_tokens(scheduler, pipeline, mb_id, launched)
    elif not prebuilt:
        # On the forward stream: the next forward may overwrite the tensors once they are packed.
        with scheduler.forward_stream_ctx:
            proxies_out = result.pp_hidden_states_proxy_tensors.tensors
            pipeline.send_proxies(proxies_out, batch, _gather_group(scheduler))
    return result, launched


def send_dict_to_next_stage(original: Any, scheduler: Any, *arguments: Any, **options: Any) -> list[Any]:
    """Proxies only, since outputs do not travel from stage to stage: `launch_batch` has sent them."""
    return original(scheduler, *arguments, **options) if current() is None else []


def _parts(forward_batch: Any) -> list[Any]:
    """What a batch consists of now; upstream puts other tensors into the same objects later."""
    sampling = getattr(forward_batch, "sampling_info", None)
    return [*vars(forward_batch).values(), *(vars(sampling).values() if sampling is not None else ())]


def _gather_group(scheduler: Any) -> Any:
    """Ranks that hold equal proxies. Up to 0.5.18 those of a context-parallel prefill do not, and upstream
    says so here; later its attention groups have one rank then."""
    return scheduler.attn_tp_group if getattr(scheduler, "require_attn_tp_allgather", True) else None


def _return_tokens(scheduler: Any, pipeline: AsyncPipeline, mb_id: int, launched: Any) -> None:
    assert pipeline.token_return is not None
    launch = pipeline.launched[mb_id]
    assert launch.device_outputs is not None
    copy = copy_to_host(launch.device_outputs, pipeline.streams, scheduler.copy_stream, launched)
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
        how="launch with proxies that are still to come, then send proxies or outputs at once",
        upstream="sglang #19582; Ascend ring deadlocks sglang #23472, #30844",
        plan=_PLAN,
        relies_on=(
            f"{_MIXIN}._pp_prepare_tensor_dict",
            f"{_MIXIN}._pp_wait_forward_dependencies",
            "sglang.srt.managers.scheduler_pp_mixin:_pp_can_skip_output_comm",
        ),
    ),
    Patch(
        target=_PREPARE,
        wrapper=prepare_batch,
        why="proxies that are waited for before the launch keep the host from preparing the batch, and put "
        "what it prepares behind them on the forward stream",
        how="wait for them here, behind the preparation and before anything that reads them",
        upstream="sglang #19582; vllm-ascend #7143",
        plan=_PLAN,
        relies_on=("sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation",),
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
