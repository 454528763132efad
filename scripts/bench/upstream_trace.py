"""A probe for an unpatched server: upstream's pipeline as a trace that `sglang_npu_pp timeline` reads.

The benchmark's plugin (probe.py) loads it where BENCH_UPSTREAM_TRACE names a folder. It wraps functions of
the scheduler, takes the time before and after each call, and changes nothing. SIGUSR2 writes the trace, as in
a patched server. Events and their names are those of `sglang_npu_pp.observe.trace`:

| event | taken |
|---|---|
| iteration | before `ingest_requests` |
| wait, ready | around the blocking receives of requests, proxies and outputs |
| launch, launched | around `_pp_launch_batch` |
| push | after a message was handed to `isend` |
| full, post_send | around the wait for the send of an earlier message of that kind, before the next one |

Outputs go round the ring in upstream: every stage but the last passes on what it received before. For
tensor-parallel size 1, `event_loop_pp`, SGLang 0.5.21, on CPU.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from sglang_npu_pp.observe.trace import RankTrace, Trace

Function = Callable[..., Any]


def register(folder: Path) -> None:
    """In every process of the server; only schedulers with pipeline stages get to the hook."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def begin(scheduler: Any, *_arguments: Any) -> None:
        Recorder(scheduler, folder).install()

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.init_pp_loop_state", begin, HookType.BEFORE
    )


class Recorder:
    """Numbers iterations and slots as `event_loop_pp` counts them, and records one scheduler."""

    def __init__(self, scheduler: Any, folder: Path) -> None:
        self._scheduler, self._folder = scheduler, folder
        self._stage = scheduler.pp_group.rank_in_group
        self.trace = Trace(enabled=True)
        self._iteration = -1
        self._launched: dict[int, int] = {}  # slot -> iteration of the last launch in it
        self._received: tuple[int, int] = (-1, -1)  # slot and iteration of the outputs to pass on

    def install(self) -> None:
        """In the main thread, before the loop begins."""
        scheduler = self._scheduler
        _wrap(scheduler, "ingest_requests", self._ingest)
        _wrap(scheduler, "_pp_send_pyobj_to_next_stage", self._send_requests)
        _wrap(scheduler, "_pp_launch_batch", self._launch)
        _wrap(scheduler, "_pp_send_proxy_to_next_stage", self._send_proxies)
        _wrap(scheduler, "_pp_send_output_to_next_stage", self._send_outputs)
        _wrap(scheduler, "_pp_recv_dict_from_prev_stage", self._receive_outputs)
        _wrap(scheduler, "_pp_commit_comm_work", self._wait_for_sends)
        if self._stage > 0:
            # Of the class: nothing can be set on the object, which has slots. There is one in a process.
            _wrap(type(scheduler.request_receiver), "_pull_raw_reqs", self._receive_requests)
            _wrap(scheduler, "_pp_recv_proxy_tensors", self._receive_proxies)
        signal.signal(signal.SIGUSR2, lambda *_: self.write())

    def write(self) -> Path:
        """Both nodes are on one machine, so the clock of every stage is that of stage 0."""
        return RankTrace.of(self.trace, self._stage, 0, offset_ns=0).write(self._folder)

    @property
    def _slots(self) -> int:
        return int(self._scheduler.pp_loop_size)

    @property
    def _slot(self) -> int:
        return self._iteration % self._slots

    def _ingest(self, original: Function, *arguments: Any, **options: Any) -> Any:
        self._iteration += 1
        self.trace.record("iteration", "", self._slot, self._iteration)
        return original(*arguments, **options)

    def _receive_requests(self, original: Function, receiver: Any) -> Any:
        return self._waited(partial(original, receiver), "requests", -1, self._iteration)

    def _receive_proxies(self, original: Function) -> Any:
        return self._waited(original, "proxy", self._slot, self._iteration)

    def _receive_outputs(self, original: Function) -> Any:
        """Of the slot that comes next."""
        slot = (self._slot + 1) % self._slots
        self._received = slot, self._launched[slot]
        return self._waited(original, "output", *self._received)

    def _waited(self, original: Function, kind: str, slot: int, iteration: int) -> Any:
        self.trace.record("wait", kind, slot, iteration)
        received = original()
        self.trace.record("ready", kind, slot, iteration)
        return received

    def _launch(self, original: Function, *arguments: Any, **options: Any) -> Any:
        self._launched[self._slot] = self._iteration
        self.trace.record("launch", "", self._slot, self._iteration)
        result = original(*arguments, **options)
        self.trace.record("launched", "", self._slot, self._iteration)
        return result

    def _send_requests(self, original: Function, *arguments: Any, **options: Any) -> Any:
        work = original(*arguments, **options)
        self.trace.record("push", "requests", -1, self._iteration)
        return work

    def _send_proxies(self, original: Function, *arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        self.trace.record("push", "proxy", self._slot, self._iteration)

    def _send_outputs(self, original: Function, slot: int, *arguments: Any, **options: Any) -> Any:
        """`slot`: which the last stage sends; a stage before it passes on what it received last."""
        is_last = self._scheduler.pp_group.is_last_rank
        work = original(slot, *arguments, **options)
        if work:
            sent = (slot, self._launched[slot]) if is_last else self._received
            self.trace.record("push", "output", *sent)
        return work

    def _wait_for_sends(self, original: Function, work: list[Any], *arguments: Any, **options: Any) -> None:
        if not work:
            original(work, *arguments, **options)
            return
        kind = self._kind(work)
        self.trace.record("full", kind, self._slot, self._iteration)
        original(work, *arguments, **options)
        self.trace.record("post_send", kind, self._slot, self._iteration)

    def _kind(self, work: list[Any]) -> str:
        if work is self._scheduler.send_req_work:
            return "requests"
        return "proxy" if work is self._scheduler.send_proxy_work else "output"


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """AttributeError, which ends the server, where this release has no such function."""
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        return wrapper(original, *arguments, **options)

    setattr(owner, name, call)
