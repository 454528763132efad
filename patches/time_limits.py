"""Seam: limits of waiting and running time of requests, up to 0.5.19.

`SGLANG_REQ_WAITING_TIMEOUT` and `SGLANG_REQ_RUNNING_TIMEOUT`, in seconds. From 0.5.20 on the leader of stage
0 sends aborts with the requests. Before, each rank uses its own clock, so a request may end on one and run on
another; here all ranks end the leader's choice.
"""

from __future__ import annotations

import math
import time
from http import HTTPStatus
from typing import Any

from sglang_npu_pp.decisions import SharedClock
from sglang_npu_pp.patching import Patch, with_names

from .pipeline import current

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_LATER_THAN_ALL = SharedClock(math.inf)


def overdue_requests(scheduler: Any) -> frozenset[str]:
    """Ids of requests to end now on all ranks. Running ones: only of the next microbatch."""
    from sglang.srt.environ import envs

    if not hasattr(scheduler, "_abort_on_waiting_timeout"):
        return frozenset()
    now = time.perf_counter()
    waiting, running = envs.SGLANG_REQ_WAITING_TIMEOUT.get(), envs.SGLANG_REQ_RUNNING_TIMEOUT.get()
    found = set()
    if waiting > 0:
        entered = {
            request.rid: request.time_stats.wait_queue_entry_time for request in scheduler.waiting_queue
        }
        found |= {rid for rid, since in entered.items() if 0 < since < now - waiting}
    if running > 0:
        entered = {
            request.rid: request.time_stats.forward_entry_time for request in scheduler.running_batch.reqs
        }
        found |= {rid for rid, since in entered.items() if 0 < since < now - running}
    return frozenset(found)


def abort_on_waiting_timeout(original: Any, scheduler: Any) -> None:
    """Upstream's function, which ends all requests that it sees, limited to the overdue ones."""
    pipeline = current()
    if not (named := pipeline.decisions.overdue):
        return
    queue = scheduler.waiting_queue
    scheduler.waiting_queue = [request for request in queue if request.rid in named]
    with_names(original, time=_LATER_THAN_ALL)(scheduler)
    scheduler.waiting_queue = [*scheduler.waiting_queue, *(one for one in queue if one.rid not in named)]


def abort_on_running_timeout(original: Any, scheduler: Any, *batch: Any) -> None:
    """`batch`: from 0.5.16 on the running batch, which 0.5.15 takes from the scheduler."""
    pipeline = current()
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    (running,) = batch or (scheduler.running_batch,)
    for request in running.reqs:
        if request.rid in pipeline.decisions.overdue and not request.finished():
            request.to_finish = FINISH_ABORT(
                "Request running timeout reached.", HTTPStatus.SERVICE_UNAVAILABLE
            )


def _patch(name: str, wrapper: Any, what: str) -> Patch:
    return Patch(
        target=f"{_SCHEDULER}.{name}",
        wrapper=wrapper,
        why=f"every rank decides by its own clock {what}; diverging stages run other requests",
        how="ends the requests named by stage 0",
        upstream="0.5.20 (aborts of the leader in the list of requests)",
        plan="goes with 0.5.19",
        relies_on=(f"{_SCHEDULER}.get_next_batch_to_run",),
        optional=True,
    )


PATCHES = (
    _patch("_abort_on_waiting_timeout", abort_on_waiting_timeout, "what has waited too long"),
    _patch("_abort_on_running_timeout", abort_on_running_timeout, "what has run too long"),
)
