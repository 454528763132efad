"""Seam: request orders that differ between processes.

Upstream queues preempted requests again in the order of a set, that of addresses; priority and queueing time
decide what runs next, so ranks would run other requests. `--schedule-policy random` shuffles with the
process's generator, which others may use.
"""

from __future__ import annotations

import random
from typing import Any

from sglang_npu_pp.patching import Patch

from .pipeline import current

_POLICY = "sglang.srt.managers.schedule_policy:SchedulePolicy"


def preempt_to_schedule(original: Any, adder: Any, request: Any, *server_args: Any) -> bool:
    """`server_args`: up to 0.5.18."""
    before = len(adder.preempt_list)
    places = {id(running): place for place, running in enumerate(adder.running_batch.reqs)}
    preempted = bool(original(adder, request, *server_args))
    adder.preempt_list[before:] = sorted(adder.preempt_list[before:], key=lambda one: places[id(one)])
    return preempted


def calc_priority(original: Any, policy: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy

    if policy.policy is CacheAgnosticPolicy.RANDOM:
        random.seed(current().iteration)
    return original(policy, *args, **kwargs)


_UPSTREAM = "none: with tensor parallelism alone its ranks may differ in this as well"

PATCHES = (
    Patch(
        target="sglang.srt.managers.schedule_policy:PrefillAdder.preempt_to_schedule",
        wrapper=preempt_to_schedule,
        why="preempted requests are queued again in the order of a set, different in every process",
        how="in the order of their batch",
        upstream=_UPSTREAM,
        plan="goes when upstream queues them in one order",
    ),
    Patch(
        target=f"{_POLICY}.calc_priority",
        wrapper=calc_priority,
        why="the random policy shuffles with a shared generator, which other code of one stage may use",
        how="starts the generator anew in each iteration",
        upstream=_UPSTREAM,
        plan="goes when upstream's policy has a generator of its own",
        relies_on=(f"{_POLICY}.__init__", f"{_POLICY}._sort_randomly"),
    ),
)
