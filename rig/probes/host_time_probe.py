"""A probe that measures what an iteration of the PP loop costs the host, outside the forward: that begins
with the call of the model and ends with the sampling (`Scheduler.run_batch`).

HOST_TIME_DIR says where the numbers go. SIGRTMIN+1 makes a scheduler write what it measured since the last
one, as `stage<S>-rank<R>.<n>.json`, and begin anew: per kind of batch ("DECODE 16": mode and requests) the
number of iterations, and in nanoseconds

cpu      CPU time of the scheduler thread; what it waits for does not count, nor does other load
process  CPU time of all threads of the process, those of gloo and ZeroMQ included
wall     wall time, with waiting for other stages and for a busy machine

HOST_TIME_PARTS=1 adds the functions in `PARTS`, their own time without that of others in the list; measuring
them costs about 2 us a call, which the sums then contain.
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

NOTHING = (0, 0, 0)
SIGNAL = signal.SIGRTMIN + 1
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver:SchedulerRequestReceiver"

# What does not exist (in a release, or without the package) is left out.
PARTS = (
    f"{_RECEIVER}.recv_requests",
    f"{_SCHEDULER}.process_input_requests",
    f"{_SCHEDULER}.get_next_batch_to_run",
    f"{_SCHEDULER}.process_batch_result",
    f"{_SCHEDULER}._pp_send_pyobj_to_next_stage",
    f"{_SCHEDULER}._pp_commit_comm_work",
    f"{_SCHEDULER}._pp_recv_typed_dict",
    f"{_SCHEDULER}._pp_launch_batch",
    f"{_SCHEDULER}._pp_send_recv_and_preprocess_output_tensors",
    f"{_SCHEDULER}._pp_prep_batch_result",
    f"{_SCHEDULER}._pp_send_proxy_to_next_stage",
    f"{_SCHEDULER}._pp_send_dict_to_next_stage",
    "sglang_npu_pp.patches.outputs:OutputTicket.synchronize",
    "sglang_npu_pp.transport.stage_link:StageLink.push_tensors",
    "sglang_npu_pp.transport.stage_link:StageLink.push",
    "sglang_npu_pp.transport.stage_link:StageLink.take",
)

Clocks = tuple[int, int, int]
Function = Callable[..., Any]


def clocks() -> Clocks:
    return time.thread_time_ns(), time.process_time_ns(), time.monotonic_ns()


def since(begin: Clocks) -> Clocks:
    now = clocks()
    return now[0] - begin[0], now[1] - begin[1], now[2] - begin[2]


class Meter:
    """The iterations of one scheduler. Those that launched nothing do not count."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._written = folder, 0
        self._totals: dict[str, dict[str, Any]] = {}
        self._begun: Clocks | None = None
        self._forward: tuple[Clocks, int] | None = None  # its begin, and CPU time of parts until then
        self._in_forward = NOTHING
        self._kind: str | None = None
        self._inner_ns: list[int] = []  # of every part that is running: CPU time of the parts inside it
        self._parts_ns: dict[str, int] = defaultdict(int)

    def begin_iteration(self) -> None:
        if self._begun is not None and self._kind is not None:
            self._add(self._kind, since(self._begun))
        self._kind, self._in_forward = None, NOTHING
        self._parts_ns.clear()
        self._begun = clocks()

    def run_batch(self, original: Function, scheduler: Any, batch: Any, *args: Any, **options: Any) -> Any:
        self._kind = f"{batch.forward_mode.name} {len(batch.reqs)}"
        self._forward = None
        result = original(scheduler, batch, *args, **options)
        if self._forward is not None:
            begin, inner_ns = self._forward
            self._in_forward = since(begin)
            if self._inner_ns:  # the part that launches: parts within the forward count no second time
                self._inner_ns[-1] = inner_ns + self._in_forward[0]
        return result

    def begin_forward(self, function: Function) -> Function:
        def call(*args: Any, **options: Any) -> Any:
            if self._forward is None:
                self._forward = clocks(), self._inner_ns[-1] if self._inner_ns else 0
            return function(*args, **options)

        return call

    def measured(self, name: str, function: Function) -> Function:
        def call(*args: Any, **options: Any) -> Any:
            begin = time.thread_time_ns()
            self._inner_ns.append(0)
            try:
                return function(*args, **options)
            finally:
                took = time.thread_time_ns() - begin
                self._parts_ns[name] += took - self._inner_ns.pop()
                if self._inner_ns:
                    self._inner_ns[-1] += took

        return call

    def write(self, *_: Any) -> None:
        from measuring import leave

        self._written += 1
        leave(self._folder, self._written, self._totals)
        self._totals = {}
        self._begun = None

    def _add(self, kind: str, spent: Clocks) -> None:
        empty = {"iterations": 0, "cpu": 0, "process": 0, "wall": 0, "parts": {}}
        total = self._totals.setdefault(kind, empty)
        total["iterations"] += 1
        for index, name in enumerate(("cpu", "process", "wall")):
            total[name] += spent[index] - self._in_forward[index]
        for name, nanoseconds in self._parts_ns.items():
            total["parts"][name] = total["parts"].get(name, 0) + nanoseconds


def register() -> None:
    folder = os.environ.get("HOST_TIME_DIR")
    if not folder or multiprocessing.parent_process() is None:
        return
    from measuring import around_run_batch

    meter = Meter(Path(folder))
    around_run_batch(meter.run_batch, SIGNAL, meter.write, lambda scheduler: wrap_loop(meter, scheduler))


def wrap_loop(meter: Meter, scheduler: Any) -> None:
    """An iteration begins with receiving requests, through `ingest_requests` from 0.5.20 on."""
    from measuring import around_model

    if os.environ.get("HOST_TIME_PARTS") == "1":
        for target in PARTS:
            wrap(target, meter.measured)

    around_model(scheduler, meter.begin_forward)

    def first(_name: str, function: Function) -> Function:
        def call(*args: Any, **options: Any) -> Any:
            meter.begin_iteration()
            return function(*args, **options)

        return call

    if not wrap(f"{_SCHEDULER}.ingest_requests", first):
        wrap(f"{_RECEIVER}.recv_requests", first)


def wrap(target: str, wrapper: Callable[[str, Function], Function]) -> bool:
    """Whether this release has `target`, which is then wrapped."""
    module, _, qualname = target.partition(":")
    owner_name, _, name = qualname.rpartition(".")
    try:
        owner = getattr(importlib.import_module(module), owner_name)
        function = getattr(owner, name)
    except (ImportError, AttributeError):
        return False
    setattr(owner, name, wrapper(qualname, function))
    return True
