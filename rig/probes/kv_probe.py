"""A probe that lets a disaggregated server run on CPU, and looks at its transfers.

With KV_PROBE_DIR each process writes what it saw there, a line of JSON each, as `<pid>.jsonl`:

{"chunk": pages, "age_ms": age, "oldest_ms": age}
    a transfer of KV begins: how long ago the forward that wrote its pages has ended, mean and maximum
{"launch": tokens, "queued": chunks}
    a forward of a prefill server: chunks that were handed to the engine before the event loop went on
{"http": url}
    the event loop waits for an HTTP server
{"lookups": ms, "cpu_ms": ms}
    an iteration of the event loop was for longer than 0.2 ms in functions that may ask a bootstrap server:
    wall time, and CPU time of its thread, which contains neither waiting nor what else the machine does
"""

from __future__ import annotations

import importlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Function = Callable[..., Any]
SHORTEST_MS = 0.2  # an event loop without requests goes round and round

_QUEUE = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
_COMMON = "sglang.srt.disaggregation.common.conn"
# Upstream's functions that may ask a bootstrap server, those we patch among them.
LOOKUPS = (
    f"{_QUEUE}._resolve_prefill_dp_rank",
    f"{_QUEUE}._resolve_pending_reqs",
    f"{_QUEUE}.prefetch_prefill_dp_rank_queries",  # from 0.5.20 on
    f"{_COMMON}:CommonKVManager.try_ensure_parallel_info",
    f"{_COMMON}:CommonKVReceiver._get_bootstrap_info_from_server",
    f"{_COMMON}:CommonKVSender._register_prefill_dp_rank",
)


class Notes:
    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def __call__(self, **what: Any) -> None:
        with self._lock, self._path.open("a") as file:
            file.write(json.dumps(what) + "\n")


def register() -> None:
    from sglang.srt.mem_cache.pool_host import common

    common._cuda_host_register = lambda *args, **kwargs: None  # there is no CUDA to lock pages for
    if folder := os.environ.get("KV_PROBE_DIR"):
        note = Notes(Path(folder) / f"{os.getpid()}.jsonl")
        watch_chunks(note)
        watch_lookups(note)
        watch_http(note)


def watch_chunks(note: Notes) -> None:
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVSender
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    launched: list[int] = []  # a forward behind which the event loop has not gone on: its tokens, its chunks
    ended: dict[int, float] = {}  # page -> when the forward that wrote it had ended
    send, send_kvcache = MooncakeKVSender.send, MooncakeKVManager.send_kvcache

    def run_batch(original: Function, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scheduler, batch, *args, **kwargs)  # on CPU the forward has then ended
        now = time.monotonic()
        if batch.out_cache_loc is not None:
            size = scheduler.token_to_kv_pool_allocator.page_size
            ended.update((location // size, now) for location in batch.out_cache_loc.tolist())
            launched[:] = [len(batch.out_cache_loc), 0]
        return result

    def go_on(*args: Any, **kwargs: Any) -> None:
        if launched:
            note(launch=launched[0], queued=launched[1])
            launched.clear()

    def watched_sender(*args: Any, **kwargs: Any) -> Any:
        if launched:
            launched[1] += 1
        return send(*args, **kwargs)

    def watched_send(self: Any, session: Any, pages: Any, *args: Any, **kwargs: Any) -> Any:
        now = time.monotonic()
        ages = [1e3 * (now - ended[page]) for page in pages.tolist() if page in ended]
        if ages:
            note(chunk=len(pages), age_ms=sum(ages) / len(ages), oldest_ms=max(ages))
        return send_kvcache(self, session, pages, *args, **kwargs)

    MooncakeKVManager.send_kvcache = watched_send
    MooncakeKVSender.send = watched_sender
    mixin = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
    HookRegistry.register(f"{mixin}._pp_pd_send_consensus_bootstrapped_ids", go_on, HookType.BEFORE)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", run_batch, HookType.AROUND)


class LookupTimes:
    """How long each iteration of the event loop is in `LOOKUPS`. The outermost call counts."""

    def __init__(self, note: Notes) -> None:
        self._note, self._wall, self._cpu, self._depth = note, 0.0, 0.0, 0
        self._installed = False

    def begin_iteration(self, *_: Any, **__: Any) -> None:
        if not self._installed:  # behind the patches, which want to be first
            self._installed = True
            for target in LOOKUPS:
                self._wrap(target)
        if 1e3 * self._wall >= SHORTEST_MS:
            self._note(lookups=1e3 * self._wall, cpu_ms=1e3 * self._cpu)
        self._wall = self._cpu = 0.0

    def _wrap(self, target: str) -> None:
        module, _, qualname = target.partition(":")
        owner_name, _, name = qualname.rpartition(".")
        owner = getattr(importlib.import_module(module), owner_name)
        if (function := getattr(owner, name, None)) is not None:
            setattr(owner, name, self._timed(function))

    def _timed(self, function: Function) -> Function:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return function(*args, **kwargs)
            self._depth += 1
            wall, cpu = time.monotonic(), time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._cpu += time.thread_time() - cpu
                    self._wall += time.monotonic() - wall

        return call


def watch_lookups(note: Notes) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    begin = LookupTimes(note).begin_iteration
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.ingest_requests", begin, HookType.BEFORE)


def watch_http(note: Notes) -> None:
    import requests

    request = requests.Session.request

    def watched(self: Any, method: Any, url: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            note(http=str(url))
        return request(self, method, url, *args, **kwargs)

    requests.Session.request = watched  # type: ignore[method-assign]
