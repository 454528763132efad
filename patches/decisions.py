"""Seam: decisions of stage 0 for all stages.

Stages run the same requests only while they decide alike, but clocks and threads differ. Upstream sends some
of these decisions; each stage makes the others by itself. Here the leader of stage 0 adds its time and its
findings to the requests of an iteration (`Decisions`), for every rank.

Between arrivals, and iterations that depend on it, the time stands still, on all ranks alike. With
data-parallel attention each group of ranks with a shared queue has its own leader and time.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_npu_pp.decisions import Decisions
from sglang_npu_pp.patching import Patch, with_names

from .grammars import polled_grammars
from .pipeline import current
from .time_limits import overdue_requests

_REAP_INTERVAL_S = 1.0  # upstream's, of sessions


def broadcast_requests(original: Any, receiver: Any, requests: Any, *local: Any) -> list[Any]:
    """On stage 0. `requests`: arrivals, None except on the leader. `local`: from 0.5.20 on, requests ended by
    upstream's own time limits."""
    pipeline = current()
    if requests is not None and (found := _decide(pipeline.scheduler, bool(requests or any(local)))):
        requests = [*requests, found]
    return pipeline.decisions.take(original(receiver, requests, *local))


def split_requests(original: Any, receiver: Any, requests: list[Any]) -> tuple[list[Any], list[Any]]:
    """With data-parallel attention upstream broadcasts control requests of the first group to all; decisions
    stay in their group."""
    work, control = original(receiver, [one for one in requests if not isinstance(one, Decisions)])
    return [*work, *(one for one in requests if isinstance(one, Decisions))], control


def _decide(scheduler: Any, arrived: bool) -> Decisions | None:
    """None if this iteration has no decisions."""
    now = time.monotonic()
    found = Decisions(now, overdue_requests(scheduler), polled_grammars(scheduler))
    if arrived or found != Decisions(now) or _time_matters(scheduler, now):
        return found
    return None


def _time_matters(scheduler: Any, now: float) -> bool:
    sessions = scheduler.session_controller
    flush = scheduler.flush_wrapper._pending
    return bool(
        (sessions.sessions and now - sessions._last_reap_time > _REAP_INTERVAL_S)
        or (flush is not None and now >= flush[1])
        or (scheduler.lora_drainer is not None and scheduler.waiting_queue)
    )


def maybe_reap(original: Any, sessions: Any, now: float, *interval: Any) -> None:
    original(sessions, current().decisions.now, *interval)


def by_shared_clock(original: Any, *args: Any, **kwargs: Any) -> Any:
    """Upstream's function, with stage 0's time."""
    return with_names(original, time=current().decisions.clock)(*args, **kwargs)


_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver"
_FLUSHES = "sglang.srt.managers.scheduler_components.flush_wrapper:SchedulerFlushWrapper"
_SESSION = "sglang.srt.session.session_controller:Session"
_SESSIONS = "sglang.srt.session.session_controller:SessionController"
_UPSTREAM = "0.5.20 sends the aborts of its time limits in this way, and nothing else"
_PLAN = "goes when upstream decides on one stage"
_BY_ITS_OWN_CLOCK = "every stage decides by its own clock; diverging stages run other requests"
_BY_SHARED_CLOCK = "decides by the time of stage 0"


def _shared_clock(target: str, what: str, relies_on: tuple[str, ...] = ()) -> Patch:
    return Patch(
        target=target,
        wrapper=by_shared_clock,
        why=f"{what}: {_BY_ITS_OWN_CLOCK}",
        how=_BY_SHARED_CLOCK,
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=relies_on,
    )


PATCHES = (
    Patch(
        target=f"{_RECEIVER}._broadcast_reqs_across_ranks",
        wrapper=broadcast_requests,
        why=_BY_ITS_OWN_CLOCK,
        how="the leader of stage 0 adds its decisions; all ranks take them out again",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=("sglang.srt.utils.common:broadcast_pyobj",),
    ),
    Patch(
        target=f"{_RECEIVER}._split_work_and_control_reqs",
        wrapper=split_requests,
        why="with data-parallel attention, all groups would get the decisions of the first group's leader",
        how="decisions go with the requests of their own group",
        upstream=_UPSTREAM,
        plan=_PLAN,
    ),
    Patch(
        target=f"{_SESSIONS}.maybe_reap",
        wrapper=maybe_reap,
        why=f"sessions with a time-out: {_BY_ITS_OWN_CLOCK}",
        how=_BY_SHARED_CLOCK,
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(f"{_SESSIONS}.__init__",),
    ),
    _shared_clock(f"{_SESSION}.__init__", "when a session was last active"),
    _shared_clock(f"{_SESSION}.create_req", "when a session was last active"),
    _shared_clock(f"{_SESSION}.is_timed_out", "whether a session is over"),
    _shared_clock(f"{_FLUSHES}.handle", "until when a flush_cache may wait"),
    _shared_clock(f"{_FLUSHES}.check_pending", "whether a flush_cache has waited too long"),
)
