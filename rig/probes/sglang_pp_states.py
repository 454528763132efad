"""For tests: what each scheduler holds when it is idle, in a file a process.

Stages that decided alike have the same requests (none), the same number of KV pages free and cached, and
have run the same number of forwards of each kind.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


def report_states(folder: Path) -> None:
    """Write `<pid>.state` in `folder` whenever an idle scheduler finds that it has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = folder / f"{os.getpid()}.state"
    last = ""
    modes: Counter[str] = Counter()

    def count(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        modes[batch.forward_mode.name.lower()] += 1
        return original(scheduler, batch, *args, **kwargs)

    def report(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal last
        state = json.dumps({**state_of(scheduler), "forwards": modes})
        if state != last:
            path.with_suffix(".part").write_text(state)
            path.with_suffix(".part").replace(path)
            last = state
        return original(scheduler, *args, **kwargs)  # which may sleep until the next request

    HookRegistry.register(f"{_SCHEDULER}.on_idle", report, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.run_batch", count, HookType.AROUND)


def state_of(scheduler: Any) -> dict[str, int]:
    batches = [batch for batch in (*scheduler.running_mbs, *scheduler.mbs) if batch is not None]
    return {
        "running": sum(len(batch.reqs) for batch in batches),
        "waiting": len(scheduler.waiting_queue),
        "grammars": len(scheduler.grammar_manager.grammar_queue),
        "chunked": int(scheduler.chunked_req is not None),
        "free": scheduler.token_to_kv_pool_allocator.available_size(),
        "cached": scheduler.tree_cache.evictable_size(),
        "protected": scheduler.tree_cache.protected_size(),
        "capacity": scheduler.max_total_num_tokens,
        "request_rows": scheduler.req_to_token_pool.available_size(),
    }
