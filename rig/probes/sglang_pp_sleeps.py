"""For tests: whether an idle scheduler slept while there was something that it has to poll.

The counters of a process are in the file "<pid>.sleeps": all sleeps, and then, for each of `KINDS`, how often
an idle iteration met something of that kind before its sleep, and how often it slept in spite of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sglang_pp_probe import Counters

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_SLEEPER = "sglang.srt.managers.scheduler_components.idle_sleeper.IdleSleeper"


def waiting_for_embeddings(scheduler: Any) -> bool:
    return scheduler.mm_receiver is not None and len(scheduler.mm_receiver.waiting_list) > 0


KINDS: Mapping[str, Callable[[Any], bool]] = {
    "embeddings": waiting_for_embeddings,
    "flush": lambda scheduler: scheduler.flush_wrapper._pending is not None,
    "sessions": lambda scheduler: any(
        session.timeout is not None for session in scheduler.session_controller.sessions.values()
    ),
    "health checks": lambda scheduler: len(scheduler.return_health_check_ipcs) > 0,
}


def count_sleeps(folder: Path) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    counters = Counters(folder / f"{os.getpid()}.sleeps", 1 + 2 * len(KINDS))
    sleeps = 0

    def sleep(original: Callable[..., Any], sleeper: Any) -> Any:
        nonlocal sleeps
        sleeps += 1
        counters.add(0)
        return original(sleeper)

    def maybe_sleep(original: Callable[..., Any], scheduler: Any) -> Any:
        before = sleeps
        met = [index for index, found in enumerate(KINDS.values()) if found(scheduler)]
        for index in met:
            counters.add(1 + 2 * index)
        result = original(scheduler)
        for index in met if sleeps > before else ():
            counters.add(2 + 2 * index)
        return result

    HookRegistry.register(f"{_SLEEPER}.maybe_sleep", sleep, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.maybe_sleep_on_idle", maybe_sleep, HookType.AROUND)
