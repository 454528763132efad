"""The probe of the benchmark (rig/probes): counts what each stage does, and stands in for an accelerator.

It is loaded into every server that is measured, upstream's as well, and does the same in each: the forward
is padded to a duration that the benchmark sets while the server runs. It begins with the call of the model,
and ends with the sampling (`Scheduler.run_batch`).

BENCH_FOLDER: where the counters go. BENCH_DESIGN=pr19582: also load that design.
BENCH_UPSTREAM_TRACE: a folder, into which an unpatched server then writes traces (upstream_trace.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rig.probes.measuring import around_model

from .counters import Counted, StageFile, stage_path


def register() -> None:
    """Runs in the engine and in every scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if os.environ.get("BENCH_DESIGN") == "pr19582":
        from . import pr19582

        pr19582.register()
    if folder := os.environ.get("BENCH_UPSTREAM_TRACE"):
        from . import upstream_trace

        upstream_trace.register(Path(folder))
    stage = Stage(Path(os.environ["BENCH_FOLDER"]))
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.run_batch", stage.run_batch, HookType.AROUND
    )
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.init_pp_loop_state", stage.begin, HookType.BEFORE
    )


class Stage:
    """The counters of one scheduler process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: StageFile | None = None
        self._cpu_s = 0.0  # of the scheduler thread, at the end of the last forward
        self._began: tuple[float, float] | None = None  # the forward: CPU time of that thread, and the clock

    def begin(self, scheduler: Any, *_arguments: Any) -> None:
        """In the scheduler's thread, before its loop: one core a stage, for every design alike."""
        stage = scheduler.pp_group.rank_in_group
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[stage * len(cores) // scheduler.pp_group.world_size]})
        self._file = StageFile.create(stage_path(self._folder, stage))
        around_model(scheduler, self.begin_forward)

    def begin_forward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self._began = self._began or (time.thread_time(), time.perf_counter())
            return function(*arguments, **options)

        return call

    def run_batch(
        self, original: Callable[..., Any], scheduler: Any, batch: Any, *arguments: Any, **options: Any
    ) -> Any:
        assert self._file is not None, "the loop has not begun"
        # Before the forward, which works on the batch: a decode batch is a verify round meanwhile.
        tokens = batch.extend_num_tokens if batch.forward_mode.is_extend() else len(batch.reqs)
        self._began = None
        result = original(scheduler, batch, *arguments, **options)
        cpu_s, began = self._began or (time.thread_time(), time.perf_counter())  # where nothing is computed
        host_cpu_s, compute_s = cpu_s - self._cpu_s, time.perf_counter() - began
        rest_s = self._file.pad_s - compute_s
        if rest_s > 0:
            time.sleep(rest_s)
        self._file.add(
            Counted(
                launches=1,
                tokens=tokens,
                forward_s=max(compute_s, self._file.pad_s),
                compute_s=compute_s,
                host_cpu_s=host_cpu_s,
            )
        )
        self._cpu_s = time.thread_time()
        return result
