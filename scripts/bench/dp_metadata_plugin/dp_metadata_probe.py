"""A SGLang plugin that measures how long the metadata of data-parallel attention block a scheduler, a step.

Loaded when its directory is on PYTHONPATH, in patched and unpatched servers alike; DP_METADATA_DIR says where
the numbers go. SIGRTMIN+1 makes a scheduler write what it measured since the last time, as
`stage<S>-rank<R>.<n>.json`: for every step that launched a batch the wall time of each of `TARGETS`, in
nanoseconds. A step goes from one preparation of a batch to the next.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SIGNAL = signal.SIGRTMIN + 1
Function = Callable[..., Any]
_DP_ATTENTION = "sglang.srt.managers.scheduler_components.dp_attn"
_ADAPTER = f"{_DP_ATTENTION}:SchedulerDPAttnAdapter"

# Name -> functions whose time counts; what a server does not have is left out.
TARGETS = {
    "blocked": (  # upstream: makes tensors, gathers, copies; ours: posts a row, and waits for all rows
        f"{_DP_ATTENTION}:MLPSyncBatchInfo.all_gather",
        "sglang_npu_pp.row_gather:RowGather.post",
        "sglang_npu_pp.row_gather:RowGather.wait",
    ),
    "whole": (  # with the decisions
        f"{_ADAPTER}.prepare_mlp_sync_batch",
        "sglang_npu_pp.patches.dp_metadata:DPMetadata.finish",
    ),
}


class Meter:
    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0
        self._steps: list[dict[str, int]] = []
        self._step: dict[str, int] = {}
        self._depth = dict.fromkeys(TARGETS, 0)
        self._launched = False

    def begin_step(self) -> None:
        if self._launched:
            self._steps.append(self._step)
        self._step, self._launched = dict.fromkeys(TARGETS, 0), False

    def launch(self) -> None:
        self._launched = True

    def timed(self, name: str, function: Function) -> Function:
        """Counts the outermost call only."""

        def call(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic_ns()
            self._depth[name] += 1
            try:
                return function(*arguments, **options)
            finally:
                self._depth[name] -= 1
                if self._depth[name] == 0 and name in self._step:
                    self._step[name] += time.monotonic_ns() - began

        return call

    def write(self, *_: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        self._written += 1
        parallel = get_parallel()
        path = self._folder / f"stage{parallel.pp_rank}-rank{parallel.tp_rank}.{self._written}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(self._steps))
        partial.replace(path)
        self._steps, self._step, self._launched = [], {}, False


def register() -> None:
    folder = os.environ.get("DP_METADATA_DIR")
    if not folder or multiprocessing.parent_process() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    meter = Meter(Path(folder))
    installed: list[bool] = []

    def run_batch(original: Function, *arguments: Any, **options: Any) -> Any:
        """Everything else is wrapped at the first batch: behind the patches, which want to be first."""
        if not installed and threading.current_thread() is threading.main_thread():
            installed.append(True)
            signal.signal(SIGNAL, meter.write)
            install(meter)
        meter.launch()
        return original(*arguments, **options)

    target = "sglang.srt.managers.scheduler.Scheduler.run_batch"
    HookRegistry.register(target, run_batch, HookType.AROUND)


def install(meter: Meter) -> None:
    for name, targets in TARGETS.items():
        for target in targets:
            wrap(target, partial(meter.timed, name))

    def first(function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            meter.begin_step()
            return function(*arguments, **options)

        return call

    wrap(f"{_ADAPTER}.prepare_mlp_sync_batch", first)


def wrap(target: str, wrapper: Callable[[Function], Function]) -> None:
    module, _, qualname = target.partition(":")
    owner_name, _, name = qualname.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), owner_name)
    except ImportError:
        return
    setattr(owner, name, wrapper(getattr(owner, name)))
