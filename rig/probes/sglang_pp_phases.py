"""For tests: what happens to a request at a certain phase of its life, and stages that decide differently.

PP_PROBE_PHASES=1     stage 0 aborts a request named "abort-at-PHASE-..." when it reaches that phase, where
                      upstream looks for requests that have taken too long. Time limits are read from the
                      file "limits" in PP_PROBE_DIR, so that one server can be asked with and without.
PP_PROBE_SLOW_GRAMMARS=SECONDS,SECONDS,...
                      every stage takes that much longer to compile a new grammar
PP_PROBE_DIVERGE=ABORTS|FLUSHES|GRAMMARS
                      stages after the first do not hear of aborts or of flush_cache, or decide for
                      themselves which grammars are ready, as releases before 0.5.18 did
PP_PROBE_ONLY_ON_STAGE_0=1
                      stages after the first do not have the files of a model whose folder is named so
PP_PROBE_LATE_CLOCK=SECONDS
                      on stages after the first, a flush sees later that its time is over
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

ABORT_AT = "abort-at-"
ONLY_ON_STAGE_0 = "only-on-stage-0"
LIMITS = {"waiting": "SGLANG_REQ_WAITING_TIMEOUT", "running": "SGLANG_REQ_RUNNING_TIMEOUT"}
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_GRAMMARS = "sglang.srt.constrained.grammar_manager.GrammarManager"


def phases_of(scheduler: Any) -> Iterator[tuple[str, Any]]:
    """Every request that the scheduler has, with the phase it is in."""
    for request in scheduler.grammar_manager.grammar_queue:
        yield "grammar", request
    for request in scheduler.waiting_queue:
        yield "waiting", request
    if scheduler.chunked_req is not None:
        yield "chunk", scheduler.chunked_req
    for batch in scheduler.mbs:
        if batch is not None and batch.forward_mode.is_extend():
            yield from (
                ("prefill", r) for r in batch.reqs if not r.output_ids and r is not scheduler.chunked_req
            )
    for batch in scheduler.running_mbs:
        for request in batch.reqs:
            if len(request.output_ids) >= 3:
                yield "decode", request
            if len(request.output_ids) == request.sampling_params.max_new_tokens - 1:
                yield "last", request


def abort_at_phases(limits: Path) -> None:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    aborted: set[str] = set()

    def poll(original: Callable[..., Any], scheduler: Any) -> list[Any]:
        wanted = json.loads(limits.read_text()) if limits.exists() else {}
        for name, variable in LIMITS.items():
            os.environ[variable] = str(wanted.get(name, -1))
        aborts = original(scheduler)
        for phase, request in phases_of(scheduler):
            name = request.rid
            if name.startswith(f"{ABORT_AT}{phase}-") and name not in aborted:
                aborted.add(name)
                aborts.append(AbortReq(rid=name))
        return aborts

    HookRegistry.register(f"{_SCHEDULER}._poll_timeout_aborts", poll, HookType.AROUND)


def stage() -> int:
    from sglang.srt.runtime_context import get_parallel

    return int(get_parallel().pp_rank)


def compile_grammars_slowly(seconds: list[float]) -> None:
    """In the thread that compiles, by stage; the last number is for all further stages."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def dispatch(original: Callable[..., Any], backend: Any, *args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds[min(stage(), len(seconds) - 1)])  # stands for a compiler that takes this long
        return original(backend, *args, **kwargs)

    target = "sglang.srt.constrained.base_grammar_backend.BaseGrammarBackend._init_value_dispatch"
    HookRegistry.register(target, dispatch, HookType.AROUND)


def only_on_the_first_stage(target: str) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def call(original: Callable[..., Any], owner: Any, request: Any) -> Any:
        return original(owner, request) if stage() == 0 else None

    HookRegistry.register(target, call, HookType.AROUND)


def decide_readiness_alone() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def synchronise(original: Callable[..., Any], manager: Any, *decision: Any) -> Any:
        told = original(manager, *decision)
        if stage() == 0:
            return told
        queue = manager.grammar_queue
        ready = {i for i, r in enumerate(queue) if not isinstance(r.grammar, Future) or r.grammar.done()}
        return ready, set()

    HookRegistry.register(f"{_GRAMMARS}._pp_sync_ready_failed", synchronise, HookType.AROUND)


_FLUSHES = "sglang.srt.managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper"
DIVERGENCES: dict[str, Callable[[], None]] = {
    "ABORTS": lambda: only_on_the_first_stage(f"{_SCHEDULER}.abort_request"),
    "FLUSHES": lambda: only_on_the_first_stage(f"{_FLUSHES}.handle"),
    "GRAMMARS": decide_readiness_alone,
}


def hide_files() -> None:
    """What the loader does about them is upstream's own."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def prepare(original: Callable[..., Any], loader: Any, model: str, *args: Any) -> Any:
        hidden = ONLY_ON_STAGE_0 in model and stage() > 0
        return original(loader, f"{model}/not-here" if hidden else model, *args)

    target = "sglang.srt.model_loader.loader.DefaultModelLoader._prepare_weights"
    HookRegistry.register(target, prepare, HookType.AROUND)


def set_clock_back(seconds: float) -> None:
    from sglang.srt.managers.scheduler_components import flush_wrapper
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    class Clock:
        late = False

        @classmethod
        def monotonic(cls) -> float:
            return time.monotonic() - (seconds if cls.late else 0)

    def check(original: Callable[..., Any], wrapper: Any) -> None:
        Clock.late = stage() > 0
        original(wrapper)
        Clock.late = False

    vars(flush_wrapper)["time"] = Clock
    target = "sglang.srt.managers.scheduler_components.flush_wrapper.SchedulerFlushWrapper.check_pending"
    HookRegistry.register(target, check, HookType.AROUND)


def register(folder: Path) -> None:
    if os.environ.get("PP_PROBE_ONLY_ON_STAGE_0") == "1":
        hide_files()
    if late := os.environ.get("PP_PROBE_LATE_CLOCK"):
        set_clock_back(float(late))
    if os.environ.get("PP_PROBE_PHASES") == "1":
        abort_at_phases(folder / "limits")
    if slow := os.environ.get("PP_PROBE_SLOW_GRAMMARS"):
        compile_grammars_slowly([float(seconds) for seconds in slow.split(",")])
    if divergence := os.environ.get("PP_PROBE_DIVERGE"):
        DIVERGENCES[divergence]()
