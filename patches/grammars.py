"""Seam: which grammars have been compiled, in 0.5.15.

Threads compile them, on every rank by itself. From 0.5.18 on stage 0 sends the others which of the waiting
requests are ready, and which have waited too long; before, the ranks of a stage agree and the stages do not.
Here the leader of stage 0 tells all ranks. One that is not ready then waits for its own thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import chain, repeat
from types import SimpleNamespace
from typing import Any

from sglang_npu_pp.decisions import NO_GRAMMARS, Grammars
from sglang_npu_pp.patching import Patch, with_names

from .pipeline import current
from .requests import is_leader

_MANAGER = "sglang.srt.constrained.grammar_manager:GrammarManager"


def polled_grammars(scheduler: Any) -> Grammars:
    """Requests whose grammar is there (or was aborted), and those that have waited for too long."""
    manager = scheduler.grammar_manager
    if hasattr(manager, "_pp_sync_ready_failed") or not manager.grammar_queue:
        return NO_GRAMMARS
    ready, failed = set(), set()
    for request in manager.grammar_queue:
        if request.finished() or request.grammar is None or request.grammar.done():
            ready.add(request.rid)
        elif request.grammar_wait_ct >= manager.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS:
            failed.add(request.rid)
    return Grammars(frozenset(ready), frozenset(failed))


def get_ready_grammar_requests(original: Any, manager: Any) -> list[Any]:
    """Upstream's function, in which all ranks have found what was told.

    Only the leader polls, as upstream does: it counts how long a request waits, and does not spin meanwhile.
    """
    pipeline = current()
    told = pipeline.told.grammars
    leader = pipeline.link.stage == 0 and is_leader()
    if told == NO_GRAMMARS and not leader:
        return []
    ranks, manager.grammar_sync_size = manager.grammar_sync_size, 2  # so that it asks what others found
    try:
        found = _gathers(_indices(manager.grammar_queue, told))
        return list(with_names(original, torch=found, time=time if leader else _no_time())(manager))
    finally:
        manager.grammar_sync_size = ranks


def _indices(queue: Iterable[Any], told: Grammars) -> tuple[set[int], set[int]]:
    """Places in the queue. One that has waited for too long and was aborted meanwhile is as good as ready."""
    failed = {i for i, request in enumerate(queue) if request.rid in told.failed and request.grammar}
    named = told.ready | told.failed
    return {i for i, request in enumerate(queue) if request.rid in named} - failed, failed


def _gathers(found: tuple[set[int], set[int]]) -> SimpleNamespace:
    """Stands for the module `torch`: whatever a rank has found, all have found this."""

    def all_gather_object(gathered: list[Any], _own: Any, group: Any) -> None:
        gathered[:] = [found] * len(gathered)

    return SimpleNamespace(distributed=SimpleNamespace(all_gather_object=all_gather_object))


def _no_time() -> SimpleNamespace:
    """Stands for the module `time`: there is none to poll in."""
    return SimpleNamespace(perf_counter=chain([0.0], repeat(math.inf)).__next__)


PATCHES = (
    Patch(
        target=f"{_MANAGER}.get_ready_grammar_requests",
        wrapper=get_ready_grammar_requests,
        why="every stage finds by itself which grammars are ready; stages that differ run other requests",
        how="stage 0 tells; a rank that is not ready waits for its compiler",
        upstream="sglang #30747 (0.5.18: stage 0 sends what it has found)",
        plan="goes with 0.5.15",
        relies_on=(f"{_MANAGER}.abort_requests",),
        unless=f"{_MANAGER}._pp_sync_ready_failed",
    ),
)
