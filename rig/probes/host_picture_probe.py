"""A probe that measures what the host does between the arrival of what it waits for and its next forward.

On stage 0 that is from the tokens of a microbatch, on later stages from the proxies of one, to the call of
the model. HOST_PICTURE_DIR says where the numbers go. SIGRTMIN+2 makes a scheduler write what it measured
since the last one, as `stage<S>-rank<R>.<n>.json`, and begin anew: per number of requests in a decode, for
each turn, CPU time of the scheduler thread by part, in nanoseconds: a part's own, without that of parts that
it calls. Measuring costs about 1 us a call.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIGNAL = signal.SIGRTMIN + 2
OTHER = "event loop"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_COMPONENTS = "sglang.srt.managers.scheduler_components"
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"

# Function -> part of the turn. What does not exist (in a release) is left out.
PARTS = {
    f"{_SCHEDULER}._pp_prep_batch_result": "tokens: batch result",
    "sglang_npu_pp.host_copies:upload": "tokens: to the device",
    f"{_SCHEDULER}.process_batch_result": "results",
    f"{_COMPONENTS}.output_streamer:SchedulerOutputStreamer.stream_output": "streaming",
    f"{_SCHEDULER}.ingest_requests": "requests in",
    f"{_SCHEDULER}.get_next_batch_to_run": "scheduling",
    f"{_SCHEDULER}.update_running_batch": "scheduling",
    f"{_BATCH}.prepare_for_decode": "next batch",
    "sglang.srt.managers.schedule_batch:alloc_for_decode": "next batch: pages",
    f"{_SCHEDULER}._pp_launch_batch": "launch",
    f"{_SCHEDULER}.run_batch": "launch",
    "sglang.srt.managers.tp_worker:TpModelWorker.forward_batch_generation": "launch",
    "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new": "forward batch",
    f"{_RUNNER}.forward": "model runner",
    "sglang_npu_pp.patches.outputs:OutputTicket.synchronize": "tokens: ours",
    "sglang_npu_pp.transport.stage_link:StageLink.push": "our messages",
    "sglang_npu_pp.transport.stage_link:StageLink.post": "our messages",
    "sglang_npu_pp.transport.stage_link:StageLink.release": "our messages",
}

Function = Callable[..., Any]


class Turn:
    """CPU time since the arrival, by part: that of the innermost one that is running."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self._spent: dict[str, int] = {}
        self._since = 0

    def begin(self) -> None:
        self._spent, self._since = {}, time.thread_time_ns()

    def end(self) -> dict[str, int]:
        self._count()
        spent, self._spent = self._spent, {}
        return spent

    def enter(self, part: str) -> None:
        self._count()
        self.running.append(part)

    def leave(self) -> None:
        self._count()
        self.running.pop()

    def _count(self) -> None:
        now = time.thread_time_ns()
        part = self.running[-1] if self.running else OTHER
        self._spent[part] = self._spent.get(part, 0) + now - self._since
        self._since = now


class Picture:
    """The turns of one scheduler."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0
        self._turn = Turn()
        self._arrived = False
        self._rows: int | None = None  # of the decode that is being launched
        self._turns: dict[int, list[dict[str, int]]] = {}

    def part(self, name: str) -> Callable[[Function], Function]:
        def around(function: Function) -> Function:
            def call(*args: Any, **options: Any) -> Any:
                self._turn.enter(name)
                try:
                    return function(*args, **options)
                finally:
                    self._turn.leave()

            return call

        return around

    def arrival(self, kind: str) -> Callable[[Function], Function]:
        """A turn begins when a message of that kind has been taken."""

        def around(function: Function) -> Function:
            def call(link: Any, pending: Any, *args: Any, **options: Any) -> Any:
                taken = function(link, pending, *args, **options)
                if pending.kind.name == kind:
                    self._arrived = True
                    self._turn.begin()
                return taken

            return call

        return around

    def run_batch(self, original: Function, scheduler: Any, batch: Any, *args: Any, **options: Any) -> Any:
        self._rows = len(batch.reqs) if batch.forward_mode.is_decode() else None
        return original(scheduler, batch, *args, **options)

    def model(self, function: Function) -> Function:
        """A turn ends when the model is called, or a graph of it replayed."""

        def call(*args: Any, **options: Any) -> Any:
            if self._arrived:
                spent = self._turn.end()
                if self._rows is not None:
                    self._turns.setdefault(self._rows, []).append(spent)
            self._arrived = False
            return function(*args, **options)

        return call

    def write(self, *_: Any) -> None:
        from measuring import leave

        self._written += 1
        leave(self._folder, self._written, self._turns)
        self._turns = {}


def register() -> None:
    folder = os.environ.get("HOST_PICTURE_DIR")
    if not folder or multiprocessing.parent_process() is None:
        return
    from measuring import around_run_batch

    picture = Picture(Path(folder))
    around_run_batch(
        picture.run_batch, SIGNAL, picture.write, lambda scheduler: _wrap_all(picture, scheduler)
    )


def _wrap_all(picture: Picture, scheduler: Any) -> None:
    from measuring import around_model

    for target, part in PARTS.items():
        _wrap(target, picture.part(part))
    stage = scheduler.pp_group.rank_in_group
    link = "sglang_npu_pp.transport.stage_link:StageLink.receive_tensors"
    _wrap(link, picture.arrival("OUTPUT" if stage == 0 else "PROXY"))
    attention = scheduler.tp_worker.model_runner.attn_backend
    attention.init_forward_metadata = picture.part("attention")(attention.init_forward_metadata)
    around_model(scheduler, picture.model)


def _wrap(target: str, wrapper: Callable[[Function], Function]) -> None:
    """Not where this release, or this server, does not have it."""
    module, _, qualname = target.partition(":")
    owner_name, _, name = qualname.rpartition(".")
    try:
        owner = importlib.import_module(module)
        owner = getattr(owner, owner_name) if owner_name else owner
        function = inspect.getattr_static(owner, name)  # the scheduler inherits some
    except (ImportError, AttributeError):
        return
    wrapped: Any = wrapper(getattr(function, "__func__", function))
    setattr(owner, name, classmethod(wrapped) if isinstance(function, classmethod) else wrapped)
