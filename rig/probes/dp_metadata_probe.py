"""A probe that measures how long the metadata of data-parallel attention block a scheduler, a step.

DP_METADATA_DIR says where the numbers go. SIGRTMIN+1 makes a scheduler write what it measured since the last
time, as `stage<S>-rank<R>.<n>.json`: for each kind of step a list of [wall, CPU time of the scheduler thread]
in nanoseconds, one a step. A step goes from one preparation of a batch to the next. "batch": it launched
requests of this rank; "idle": it took part in those of the others; "nothing": no rank had any.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNAL = signal.SIGRTMIN + 1
KINDS = ("batch", "idle", "nothing")
MOST = 50_000  # of each kind: a server without requests goes round and round
Function = Callable[..., Any]
_DP_ATTENTION = "sglang.srt.managers.scheduler_components.dp_attn"
_PREPARATION = f"{_DP_ATTENTION}:SchedulerDPAttnAdapter.prepare_mlp_sync_batch"

# What blocks. Upstream's makes tensors, gathers and copies; ours posts a row, and waits for those of all. A
# server has one of them or calls one from the other: the outermost call counts.
BLOCKING = (
    f"{_DP_ATTENTION}:MLPSyncBatchInfo.all_gather",
    "sglang_npu_pp.row_gather:RowGather.post",
    "sglang_npu_pp.row_gather:RowGather.wait",
)


class Meter:
    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0
        self._steps: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self._wall = self._cpu = self._depth = 0
        self._kind = "nothing"

    def begin_step(self) -> None:
        steps = self._steps[self._kind]
        if self._wall and len(steps) < MOST:
            steps.append((self._wall, self._cpu))
        self._wall = self._cpu = 0
        self._kind = "nothing"

    def launch(self, batch: Any) -> None:
        self._kind = "idle" if batch.forward_mode.is_idle() else "batch"

    def timed(self, function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            self._depth += 1
            wall, cpu = time.monotonic_ns(), time.thread_time_ns()
            try:
                return function(*arguments, **options)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self._cpu += time.thread_time_ns() - cpu
                    self._wall += time.monotonic_ns() - wall

        return call

    def beginning(self, function: Function) -> Function:
        def call(*arguments: Any, **options: Any) -> Any:
            self.begin_step()
            return function(*arguments, **options)

        return call

    def write(self, *_: Any) -> None:
        from measuring import leave

        self._written += 1
        leave(self._folder, self._written, self._steps)
        self._steps.clear()


def register() -> None:
    folder = os.environ.get("DP_METADATA_DIR")
    if not folder or multiprocessing.parent_process() is None:
        return
    from measuring import around_run_batch

    meter = Meter(Path(folder))

    def run_batch(original: Function, scheduler: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
        meter.launch(batch)
        return original(scheduler, batch, *arguments, **options)

    def wrap_all(_scheduler: Any) -> None:
        for target in BLOCKING:
            wrap(target, meter.timed)
        wrap(_PREPARATION, meter.beginning)

    around_run_batch(run_batch, SIGNAL, meter.write, wrap_all)


def wrap(target: str, wrapper: Callable[[Function], Function]) -> None:
    """Where this server has it: an unpatched one has nothing of ours in use."""
    module, _, qualname = target.partition(":")
    owner_name, _, name = qualname.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), owner_name)
    except ImportError:
        return
    setattr(owner, name, wrapper(getattr(owner, name)))
