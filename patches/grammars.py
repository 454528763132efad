"""Seam: readiness of compiled grammars, up to 0.5.15.post1.

Every rank compiles in threads. From 0.5.16 on stage 0 sends ready requests and those past the wait limit;
before, only the ranks of a stage agree. Here the leader of stage 0 decides for all.
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
    """Requests with a compiled or aborted grammar, and those past the wait limit."""
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
    """Upstream's function, with stage 0's decision as all ranks' result.

    Only the leader polls: that counts a request's wait, and must not spin.
    """
    pipeline = current()
    decided = pipeline.decisions.grammars
    leader = pipeline.link.stage == 0 and is_leader()
    if decided == NO_GRAMMARS and not leader:
        return []
    ranks, manager.grammar_sync_size = manager.grammar_sync_size, 2  # so that it gathers from others
    try:
        found = _gathers(_indices(manager.grammar_queue, decided))
        return list(with_names(original, torch=found, time=time if leader else _no_time())(manager))
    finally:
        manager.grammar_sync_size = ranks


def _indices(queue: Iterable[Any], decided: Grammars) -> tuple[set[int], set[int]]:
    """Places in the queue. A request past its limit but aborted meanwhile counts as ready."""
    failed = {i for i, request in enumerate(queue) if request.rid in decided.failed and request.grammar}
    named = decided.ready | decided.failed
    return {i for i, request in enumerate(queue) if request.rid in named} - failed, failed


def _gathers(found: tuple[set[int], set[int]]) -> SimpleNamespace:
    """Replaces the module `torch`: a gather with this result."""

    def all_gather_object(gathered: list[Any], _own: Any, group: Any) -> None:
        gathered[:] = [found] * len(gathered)

    return SimpleNamespace(distributed=SimpleNamespace(all_gather_object=all_gather_object))


def _no_time() -> SimpleNamespace:
    """Replaces the module `time`: no time for polling."""
    return SimpleNamespace(perf_counter=chain([0.0], repeat(math.inf)).__next__)


PATCHES = (
    Patch(
        target=f"{_MANAGER}.get_ready_grammar_requests",
        wrapper=get_ready_grammar_requests,
        why="every stage polls its own compiler; diverging stages run other requests",
        how="stage 0 decides; a rank that is not ready waits for its compiler",
        upstream="sglang #30747 (0.5.16: stage 0 sends its result)",
        plan="goes with 0.5.15.post1",
        relies_on=(f"{_MANAGER}.abort_requests",),
        unless=f"{_MANAGER}._pp_sync_ready_failed",
    ),
)
