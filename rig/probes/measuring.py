"""What probes share that measure a scheduler: where they begin, and the files in which they leave numbers.

Imported by its bare name, inside of functions: a server that loads no such probe imports none of it.
"""

from __future__ import annotations

import functools
import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"


def around_run_batch(
    around: Callable[..., Any], signal_number: int, write: Callable[..., None], wrap: Callable[[Any], None]
) -> None:
    """Call `around(original, scheduler, batch, ...)` in the place of `run_batch`.

    At the first batch, behind the patches, which want to be first, `wrap` gets the scheduler and replaces
    everything else; the signal calls `write` from then on.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    installed: list[bool] = []

    def run_batch(original: Callable[..., Any], scheduler: Any, *arguments: Any, **options: Any) -> Any:
        if not installed and threading.current_thread() is threading.main_thread():
            installed.append(True)
            signal.signal(signal_number, write)
            wrap(scheduler)
        return around(original, scheduler, *arguments, **options)

    HookRegistry.register(RUN_BATCH, run_batch, HookType.AROUND)


def around_model(scheduler: Any, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `wrapper` around the calls of the scheduler's model, and around the replays of its graphs.

    There a forward begins on a device, whatever the host has prepared before. A draft has a model of its own.
    """
    runner = scheduler.tp_worker.model_runner
    forward = runner.model.forward
    runner.model.forward = functools.wraps(forward)(wrapper(forward))  # SGLang looks at its arguments
    backend = getattr(getattr(runner, "decode_cuda_graph_runner", None), "backend", None)
    for graph in getattr(backend, "_graphs", {}).values():
        graph.replay = wrapper(graph.replay)


def leave(folder: Path, number: int, measured: Any) -> None:
    """As `stage<S>-rank<R>.<number>.json`; whole, once it has that name."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    path = folder / f"stage{parallel.pp_rank}-rank{parallel.tp_rank}.{number}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(measured))
    partial.replace(path)
