"""The probe (rig/probes) of the benchmark on the simulated Ascend: device time for forwards, and notes.

It is loaded into every server that is measured, upstream's as well, and does the same in each. A forward
takes at least as long as the benchmark sets (`Control`), on its stream and not on the host: the host launches
it and goes on. A line for every launch goes to a file: what the scheduler thread did since its start, and
when forwards began and ended on the device. The clock is `time.monotonic_ns`, equal in all processes.

BENCH_FOLDER: where the files are. BENCH_DESIGN=pr19582: also load that design.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TextIO

import msgspec

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"
_MIXIN = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"


class Control:
    """How long a forward takes at least, in microseconds: a number in a file that all processes map."""

    _SIZE = 8

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), self._SIZE)

    @classmethod
    def create(cls, path: Path) -> Self:
        path.write_bytes(bytes(cls._SIZE))
        return cls(path)

    @property
    def forward_us(self) -> int:
        return int(struct.unpack("<q", self._map[: self._SIZE])[0])

    @forward_us.setter
    def forward_us(self, microseconds: int) -> None:
        self._map[: self._SIZE] = struct.pack("<q", microseconds)


class Host(msgspec.Struct, frozen=True, array_like=True):
    """What the scheduler thread has done since its start, in nanoseconds."""

    cpu: int = 0  # on a core
    gloo: int = 0  # inside `Work.wait`, of any process group
    requests: int = 0  # until a message of ours was there, by kind
    proxies: int = 0
    outputs: int = 0
    backpressure: int = 0  # ours: until a send had a window or a slot
    device: int = 0  # in calls of CANN: blocking copies, synchronisation with streams and events

    def __sub__(self, earlier: Host) -> Host:
        return Host(*(getattr(self, name) - getattr(earlier, name) for name in self.__struct_fields__))


class Launch(msgspec.Struct, frozen=True, array_like=True):
    """One launch of one stage."""

    began: int  # when the runner of the model had all that it waits for
    ended: int  # when the host had launched it
    slot: int  # of the microbatch
    decode: bool
    rows: int  # requests
    forward: int  # the number of its forward, from 0 on
    host: Host  # when it began
    results: list[tuple[int, int]]  # since the launch before: (slot, when the host had its tokens)
    stretches: list[list[int]]  # forwards that have ended on the device since; see `Stretch`


def control_path(folder: Path) -> Path:
    return folder / "control"


def notes_path(folder: Path, stage: int) -> Path:
    return folder / f"stage{stage}.launches"


def register() -> None:
    """Runs in the engine and in every scheduler."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if os.environ.get("BENCH_DESIGN") == "pr19582":
        from . import pr19582

        pr19582.register()
    stage = Stage(Path(os.environ["BENCH_FOLDER"]))
    HookRegistry.register(f"{_SCHEDULER}.init_model_worker", stage.pad_forwards, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}.init_pp_loop_state", stage.begin, HookType.BEFORE)
    HookRegistry.register(f"{_SCHEDULER}.run_batch", stage.run_batch, HookType.AROUND)
    HookRegistry.register(f"{_RUNNER}._forward_raw", stage.begin_launch, HookType.BEFORE)
    HookRegistry.register(f"{_MIXIN}._pp_process_batch_result", stage.results, HookType.AROUND)


class Stage:
    """The notes of one scheduler process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: TextIO | None = None
        self._forwards = 0
        self._began: tuple[int, Host] | None = None  # the launch
        self._gloo_ns = 0
        self._results: list[tuple[int, int]] = []

    def pad_forwards(self, _result: None, scheduler: Any) -> None:
        """Behind the waits for proxies and before sampling: the forward of the model itself, or the replay of
        a graph of it, before the event behind it."""
        control = Control(control_path(self._folder))
        runner = scheduler.tp_worker.model_runner
        self._pad(runner.model, "forward", control)
        backend = getattr(runner.decode_cuda_graph_runner, "backend", None)
        for graph in getattr(backend, "_graphs", {}).values():
            self._pad(graph, "replay", control)

    def _pad(self, owner: Any, name: str, control: Control) -> None:
        from ascend_sim import kernels

        original = getattr(owner, name)

        @functools.wraps(original)
        def padded(*arguments: Any, **options: Any) -> Any:
            self._forwards += 1
            kernels.begin_stretch()
            result = original(*arguments, **options)
            kernels.end_stretch(control.forward_us)
            return result

        setattr(owner, name, padded)

    def begin(self, scheduler: Any, *_arguments: Any) -> None:
        """In the scheduler's thread, before its loop."""
        import torch.distributed as dist

        wait = dist.Work.wait

        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.monotonic_ns()
            try:
                return wait(*arguments, **options)
            finally:
                self._gloo_ns += time.monotonic_ns() - began

        dist.Work.wait = timed  # type: ignore[method-assign]
        stage = scheduler.pp_group.rank_in_group
        self._file = notes_path(self._folder, stage).open("w")

    def begin_launch(self, *_arguments: Any, **_options: Any) -> None:
        if self._began is None:
            self._began = time.monotonic_ns(), self._host()

    def run_batch(
        self, original: Callable[..., Any], scheduler: Any, batch: Any, *arguments: Any, **options: Any
    ) -> Any:
        from ascend_sim import kernels

        forward, self._began = self._forwards, None
        result = original(scheduler, batch, *arguments, **options)
        self.begin_launch()  # where nothing is computed
        assert self._began is not None
        began, host = self._began
        launch = Launch(
            began,
            time.monotonic_ns(),
            _slot_of(scheduler, batch),
            batch.forward_mode.is_decode(),
            len(batch.reqs),
            forward,
            host,
            self._results,
            [list(stretch) for stretch in kernels.take_stretches()],
        )
        self._results = []
        assert self._file is not None, "the loop has not begun"
        self._file.write(msgspec.json.encode(launch).decode() + "\n")
        self._file.flush()
        return result

    def results(self, original: Callable[..., Any], scheduler: Any, batch: Any, *arguments: Any) -> Any:
        self._results.append((_slot_of(scheduler, batch), time.monotonic_ns()))
        return original(scheduler, batch, *arguments)

    def _host(self) -> Host:
        from ascend_sim import kernels

        requests, proxies, outputs, backpressure = _waits_of_ours()
        return Host(
            cpu=time.thread_time_ns(),
            gloo=self._gloo_ns,
            requests=requests,
            proxies=proxies,
            outputs=outputs,
            backpressure=backpressure,
            device=kernels.host_waits().nanoseconds,
        )


def _slot_of(scheduler: Any, batch: Any) -> int:
    return next(slot for slot, other in enumerate(scheduler.mbs) if other is batch)


def _waits_of_ours() -> list[int]:
    """Requests, proxies, outputs, back-pressure."""
    from sglang_npu_pp.patches.pipeline import current_or_none

    pipeline = current_or_none()
    if pipeline is None:
        return [0, 0, 0, 0]
    telemetry = pipeline.link.telemetry
    seconds = [telemetry.receiving(kind).wait_s for kind in ("requests", "proxy", "output")]
    seconds.append(sum(counters.backpressure_s for counters in list(telemetry.sent.values())))
    return [round(1e9 * value) for value in seconds]
