"""Seam: the requests of an iteration, from stage to stage.

Upstream: the leader of a stage sends a size and a pickle over gloo; the next stage's leader waits for both
and broadcasts them. Here every rank pushes its list to the same rank of the next stage at once, in one
message.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.transport.message import Kind

from .parallel import get_parallel
from .pipeline import current

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver"


def recv_requests(original: Any, receiver: Any, **options: Any) -> list[Any]:
    """On later stages the list is complete on every rank, with image features as ordinary tensors, not in
    shared memory. `options`: aborts added by stage 0, from 0.5.20 on."""
    pipeline = current()
    pipeline.begin_iteration()
    if pipeline.link.stage == 0:
        return pipeline.intake.next_list(original(receiver, **options))
    _enter_barrier(receiver)
    return _receive_as_upstream_counts()(receiver)


@functools.cache
def _receive_as_upstream_counts() -> Callable[[Any], list[Any]]:
    """With upstream's decorator: its time in metrics, its range in profiles."""

    def receive(receiver: Any) -> list[Any]:
        return current().receive_requests()

    decorated: Callable[[Any], list[Any]] = _decorator_of_recv_requests()(receive)
    return decorated


def _decorator_of_recv_requests() -> Callable[..., Any]:
    with suppress(ImportError):
        from sglang.srt.observability import scheduler_stage_metrics as stages

        return stages.scheduler_stage_method(stages.SCHEDULER_STAGE_RECV_REQUESTS)
    with suppress(ImportError):  # up to 0.5.19 there are only profiles
        from sglang.srt.utils.nvtx_utils import scheduler_nvtx_method

        return scheduler_nvtx_method("scheduler.recv_requests")
    return lambda function: function  # in 0.5.13 neither


def _enter_barrier(receiver: Any) -> None:
    """With SGLANG_ENABLE_COLOCATED_BATCH_GEN all ranks enter a barrier in every iteration, which releases
    held-back requests together. Later stages hold none back."""
    if receiver.input_blocker is not None:
        barrier = receiver.input_blocker._global_unblock_barrier
        barrier._noop = True
        barrier.poll_global_arrived()


def process_input_requests(original: Any, scheduler: Any, requests: list[Any]) -> None:
    """Forwarded after processing, as upstream sends them; but before the agreement on a control request, the
    last of its list (`control.handle`)."""
    pipeline = current()
    pipeline.requests = requests
    if pipeline.ahead is not None and (requests or pipeline.decisions.this_iteration is not None):
        pipeline.ahead.settle()
    original(scheduler, requests)
    pipeline.send_requests()


def send_to_next_stage(original: Any, scheduler: Any, data: Any, async_send: bool = False) -> list[Any]:
    """Requests were sent in `process_input_requests`; here the request ids on which stages of a disaggregated
    server agree, once around the ring."""
    pipeline = current()
    if data is not pipeline.sent_requests and is_leader():
        following = (pipeline.link.stage + 1) % pipeline.link.stages
        pipeline.link.push(Kind.CONSENSUS, following, data)
    return []


def recv_from_previous_stage(original: Any, scheduler: Any) -> Any:
    pipeline = current()
    data: Any = []
    if is_leader():
        previous = (pipeline.link.stage - 1) % pipeline.link.stages
        data = pipeline.link.post(Kind.CONSENSUS, previous).wait_values()
    return _broadcast_inside_stage(scheduler, data)


def _broadcast_inside_stage(scheduler: Any, data: Any) -> Any:
    """From the leader to all; not every release has a function for it."""
    from sglang.srt.utils import broadcast_pyobj

    for group in (scheduler.attn_tp_group, scheduler.attn_cp_group):
        if group.world_size > 1:
            data = broadcast_pyobj(data, group.rank, group.cpu_group, src=group.ranks[0])
    return data


def is_leader() -> bool:
    parallel = get_parallel()
    return parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0


_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_POINT_TO_POINT = "sglang.srt.utils.common:point_to_point_pyobj"
_PLAN = "goes when upstream relays requests without waiting for a rendezvous"

PATCHES = (
    Patch(
        target=f"{_RECEIVER}.recv_requests",
        wrapper=recv_requests,
        why="later stages wait for the leader's gloo message and then for a broadcast",
        how="number the iteration; later stages take the message already in their inbox, every rank its own",
        upstream="sglang #19582",
        plan=_PLAN,
        relies_on=(
            f"{_RECEIVER}._pull_raw_reqs",
            f"{_RECEIVER}._finalize_shm_features",
            "sglang.srt.managers.scheduler_input_blocker:SchedulerInputBlocker.handle",
            "sglang.srt.utils.poll_based_barrier:PollBasedBarrier.poll_global_arrived",
            f"{_SCHEDULER}.ingest_requests",
            f"{_MIXIN}.event_loop_pp",
            f"{_MIXIN}.init_pp_loop_state",
            "sglang.srt.observability.scheduler_stage_metrics:scheduler_stage_method",
        ),
    ),
    Patch(
        target=f"{_SCHEDULER}.process_input_requests",
        wrapper=process_input_requests,
        why="the disaggregated loops send requests at the end of an iteration, and every stage "
        "waits for a gloo rendezvous of size and pickle",
        how="push the list to the next stage at once",
        upstream="sglang #19582 (split phases); field notes, section 1",
        plan=_PLAN,
    ),
    Patch(
        target=f"{_MIXIN}._pp_send_pyobj_to_next_stage",
        wrapper=send_to_next_stage,
        why="two gloo sends that complete only when the next stage receives",
        how="one push on the host lane",
        upstream="sglang #19582",
        plan=_PLAN,
        relies_on=(_POINT_TO_POINT,),
    ),
    Patch(
        target=f"{_MIXIN}._pp_recv_pyobj_from_prev_stage",
        wrapper=recv_from_previous_stage,
        why="two blocking gloo receives",
        how="one host-lane message; the broadcast inside the stage stays",
        upstream="sglang #19582",
        plan=_PLAN,
        relies_on=(_POINT_TO_POINT, "sglang.srt.utils.common:broadcast_pyobj"),
    ),
)
