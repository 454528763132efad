"""Sleep of an idle server, while nothing needs polling.

As upstream's --sleep-on-idle, off by default there because its stages spin on gloo. The sleeper wakes on a
client's write to a socket of the first stage, or after a second; all other ranks wait for that rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from .disaggregation import is_disaggregated
from .parallel import get_parallel, memory_settings
from .pipeline import current_or_none


def sleep_when_idle(scheduler: Any, parallel: Any) -> None:
    """Give the rank that listens to clients a sleeper, unless upstream has."""
    from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper

    leader = parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
    channels = scheduler.ipc_channels
    if (
        scheduler.idle_sleeper is not None
        or parallel.pp_rank > 0
        or not leader
        or channels.recv_from_rpc is None
    ):
        return
    options: dict[str, Any] = {}
    if "can_empty_cache" in inspect.signature(IdleSleeper).parameters:  # 0.5.21 and later
        options["can_empty_cache"] = lambda: not scheduler._engine_paused
    sockets = [channels.recv_from_tokenizer, channels.recv_from_rpc]
    scheduler.idle_sleeper = AskingSleeper(scheduler, IdleSleeper(sockets=sockets, **options))


class AskingSleeper:
    """Upstream's sleeper, with a check of the scheduler before each sleep."""

    def __init__(self, scheduler: Any, sleeper: Any) -> None:
        self._scheduler, self._sleeper = scheduler, sleeper

    def maybe_sleep(self) -> None:
        if may_sleep(self._scheduler):
            self._sleeper.maybe_sleep()


def may_sleep(scheduler: Any) -> bool:
    """Whether only clients can create work. A failing check counts as pending."""
    try:
        return not any(polls(scheduler) for polls in (*_ALWAYS_POLLED, *_PENDING))
    except AttributeError:
        return False


def _has_data_parallel_attention(scheduler: Any) -> bool:
    parallel = get_parallel()
    elastic = getattr(parallel, "attn_dp_enabled", False)  # 0.5.22 and later: a rank that joins later, too
    return bool(parallel.attn_dp_size > 1 or elastic)


_SECOND_TIERS = (
    "enable_hierarchical_cache",
    "enable_lmcache",
    "enable_flexkv",
    "enable_unified_cache_external_linker",
    "enable_hisparse",
)


def _has_second_tier(scheduler: Any) -> bool:
    """Releases differ in these settings and their places."""
    places = [scheduler, scheduler.server_args, *memory_settings()]
    return any(getattr(place, flag, False) for place in places for flag in _SECOND_TIERS)


def _has_input_blocker(scheduler: Any) -> bool:
    return scheduler.request_receiver.input_blocker is not None


def _is_scripted(scheduler: Any) -> bool:
    return getattr(scheduler.request_receiver, "scripted_scheduler_hook", None) is not None


def _keeps_requests(scheduler: Any) -> bool:
    pipeline = current_or_none()
    return pipeline is not None and pipeline.intake.keeps_some


def _waits_for_embeddings(scheduler: Any) -> bool:
    receiver = scheduler.request_receiver.mm_receiver
    return receiver is not None and bool(receiver.waiting_list)


def _has_deferred_flush(scheduler: Any) -> bool:
    return scheduler.flush_wrapper._pending is not None


def _has_sessions_that_end(scheduler: Any) -> bool:
    sessions = scheduler.session_controller.sessions.values()
    return any(session.timeout is not None or session.close_on_finish for session in sessions)


def _has_health_checks(scheduler: Any) -> bool:
    return bool(scheduler.return_health_check_ipcs)


# Polls in the loops of 0.5.13 to 0.5.23. These rule out sleep: transfers, handshakes and prefetched KV of
# disaggregated servers; data-parallel attention, whose ranks all listen, and joining elastic ranks; a cache's
# second tier, on every stage (write-back, load-back, prefetch, storage); the input blocker's barrier; the
# scripted test runtime.
_ALWAYS_POLLED: tuple[Callable[[Any], bool], ...] = (
    is_disaggregated,
    _has_data_parallel_attention,
    _has_second_tier,
    _has_input_blocker,
    _is_scripted,
)
# These rule it out while pending. An idle iteration answers one health check.
_PENDING: tuple[Callable[[Any], bool], ...] = (
    _keeps_requests,
    _waits_for_embeddings,
    _has_deferred_flush,
    _has_sessions_that_end,
    _has_health_checks,
)
# Not listed, because upstream stays awake for them itself (`Scheduler.is_fully_idle`): waiting and chunked
# requests with their adapters (LoRA) and time limits, grammars, batches. Nor because a second is not late:
# metrics, load and KV events (also published before each sleep); weights (loaded inside their request);
# watchdogs (batches only); n-gram corpora (speculation, upstream's path); the Rust server (its own sleeper).
