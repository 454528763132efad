"""A SGLang plugin that lets a disaggregated server run on CPU, and looks at its transfers.

Loaded when its directory is on PYTHONPATH, in patched and unpatched servers alike. With KV_PROBE_DIR each
process writes what it saw there, a line of JSON each, as `<pid>.jsonl`:

{"chunk": pages, "age_ms": age, "oldest_ms": age}
    a transfer of KV begins: how long ago the forward that wrote its pages has ended, mean and maximum
{"launch": tokens, "queued": chunks}
    a forward of a prefill server: chunks that were handed to the engine before the event loop went on
{"http": url}
    the event loop waits for an HTTP server
{"step": name, "ms": time}
    a step of the decode server's event loop, which may ask a bootstrap server, took longer than 1 ms
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Function = Callable[..., Any]


def register() -> None:
    from sglang.srt.mem_cache.pool_host import common

    common._cuda_host_register = lambda *args, **kwargs: None  # there is no CUDA to lock pages for
    if folder := os.environ.get("KV_PROBE_DIR"):
        watch(Path(folder) / f"{os.getpid()}.jsonl")


def watch(path: Path) -> None:
    import requests
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, MooncakeKVSender
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    launched: list[
        int
    ] = []  # tokens of a forward behind which the event loop has not gone on, then its chunks
    ended: dict[int, float] = {}  # page -> when the forward that wrote it had ended
    lock = threading.Lock()

    def note(**what: Any) -> None:
        with lock, path.open("a") as file:
            file.write(json.dumps(what) + "\n")

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

    send = MooncakeKVSender.send

    def watched_sender(*args: Any, **kwargs: Any) -> Any:
        if launched:
            launched[1] += 1
        return send(*args, **kwargs)

    send_kvcache = MooncakeKVManager.send_kvcache

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

    for name in ("ingest_requests", "process_decode_queue"):

        def timed(original: Function, *args: Any, name: str = name, **kwargs: Any) -> Any:
            begin = time.monotonic()
            result = original(*args, **kwargs)
            if (ms := 1e3 * (time.monotonic() - begin)) > 1:
                note(step=name, ms=ms)
            return result

        HookRegistry.register(f"sglang.srt.managers.scheduler.Scheduler.{name}", timed, HookType.AROUND)

    request = requests.Session.request

    def watched_request(self: Any, method: Any, url: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            note(http=str(url))
        return request(self, method, url, *args, **kwargs)

    requests.Session.request = watched_request  # type: ignore[method-assign]
