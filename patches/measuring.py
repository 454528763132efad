"""How long forwards take: for the trace while one is recorded, and at first for the advice on the depth."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .pipeline import AsyncPipeline

logger = logging.getLogger("sglang_npu_pp")


@contextmanager
def measured(scheduler: Any, pipeline: AsyncPipeline, slot: int, counted: bool) -> Iterator[None]:
    """Around the launch of a forward.

    The first busy launches are timed; then stage 0 says which depth would hide the link, and that is all.
    `counted` is False for a batch whose outputs nobody waits for: the link does not hold it up.
    """
    adviser = pipeline.adviser
    if adviser is None:
        with pipeline.timing(scheduler.forward_stream_ctx, slot):
            yield
        return
    mode = scheduler.mbs[slot].forward_mode
    kind = "decode" if mode.is_decode() else "prefill" if mode.is_extend() else mode.name
    with scheduler.forward_stream_ctx:
        adviser.begin(kind if counted else "skipped", pipeline.iteration)
    with pipeline.timing(scheduler.forward_stream_ctx, slot):
        yield
    with scheduler.forward_stream_ctx:
        adviser.end()
    if adviser.finished:
        pipeline.adviser = None
        if pipeline.link.stage == 0:
            limit = scheduler.server_args.pp_max_micro_batch_size
            logger.info("sglang-npu-pp: %s", adviser.advice(scheduler.max_running_requests, limit))
