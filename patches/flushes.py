"""Seam: a flush of the prefix cache that waits for the server to be idle, with a time limit.

Upstream lets every stage look at its own clock: stage 0 gives up and says so, another one that looks a
moment later is idle by then and flushes, and its prefix cache is no longer that of its neighbours. Whether a
stage is idle follows from the requests and is equal on all stages in the same iteration. So stage 0's clock
decides alone; the others hear of it with the next list of requests, before they look again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sglang_npu_pp.patching import Patch

from .pipeline import AsyncPipeline, current

_WRAPPER = "sglang.srt.managers.scheduler_components.flush_wrapper:SchedulerFlushWrapper"


@dataclass(frozen=True)
class FlushGivenUp:
    """Stage 0's notice that the flush which waits was not done in time."""


def check_pending(original: Any, wrapper: Any) -> None:
    pipeline = current()
    waiting = wrapper._pending
    if pipeline is None or waiting is None:
        original(wrapper)
        return
    if pipeline.link.stage > 0:
        wrapper._pending = (waiting[0], math.inf)
        original(wrapper)
        return
    original(wrapper)
    if wrapper._pending is None and not wrapper._is_fully_idle():
        pipeline.intake.notices.append(FlushGivenUp())


def obey_notices(pipeline: AsyncPipeline, scheduler: Any, requests: list[Any]) -> list[Any]:
    """Do what stage 0 has decided; returns what is left for upstream."""
    left = [request for request in requests if not isinstance(request, FlushGivenUp)]
    if len(left) == len(requests):
        return requests
    if pipeline.link.stage > 0:
        scheduler.flush_wrapper._pending = None
    return left


PATCHES = (
    Patch(
        target=f"{_WRAPPER}.check_pending",
        wrapper=check_pending,
        why="every stage gives a flush up by its own clock; one that is idle by then flushes nevertheless, "
        "and the stages have different prefix caches",
        how="stage 0's clock decides, the others hear of it with the next list of requests",
        upstream="of the kind of sglang #25887 (time limits decided per stage)",
        plan="goes when upstream lets the first stage decide",
        relies_on=(f"{_WRAPPER}.__init__", f"{_WRAPPER}.handle"),
    ),
)
