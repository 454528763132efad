"""Asynchronous pipeline of a scheduler process: state shared by the seams.

One a process, `current()`. Without it (one stage, an unsupported feature) upstream's path runs:
`has_pipeline`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from sglang_npu_pp.decisions import SharedDecisions
from sglang_npu_pp.host_copies import HostCopy
from sglang_npu_pp.observe.reporting import Reporter
from sglang_npu_pp.observe.stage_times import DepthAdviser, ForwardTimer
from sglang_npu_pp.outcomes import Outcome
from sglang_npu_pp.ready_counts import Counts, ReadyCounts
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.token_return import TokenReturn
from sglang_npu_pp.transfer_gate import TransferGate
from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.stage_link import GatherGroup, Pending, StageLink

from .intake import Intake

_current: AsyncPipeline | None = None
_left_to_upstream = False


def current() -> AsyncPipeline:
    """The pipeline of this process, in functions guarded by `has_pipeline`."""
    assert _current is not None
    return _current


def current_or_none() -> AsyncPipeline | None:
    """None on upstream's path, and without a scheduler."""
    return _current


def set_current(pipeline: AsyncPipeline | None) -> None:
    global _current
    _current = pipeline


def has_pipeline(*_: Any, **__: Any) -> bool:
    """`Patch.when` of seams that need a pipeline."""
    return _current is not None


def leave_to_upstream() -> None:
    """No asynchronous path on this server: `is_ours` seams are off, too."""
    global _left_to_upstream
    _left_to_upstream = True


def is_ours(*_: Any, **__: Any) -> bool:
    """`Patch.when` of seams that run with one stage, too."""
    return not _left_to_upstream


@dataclass(frozen=True)
class Launch:
    """Launch of a microbatch slot, for its outputs."""

    iteration: int
    skipped: bool  # a pure middle chunk: its outputs are placeholders and do not travel
    outputs: HostCopy | None = None  # last stage: its own outputs, unless they are skipped


class Prepared(Protocol):
    """What is prepared ahead on stage 0 (see ahead.py)."""

    def prepare(self, batch: Any, slot: int) -> None:
        """Before the wait for the tokens of `batch`."""

    def check(self, tokens: Sequence[int]) -> None:
        """What they leave of it."""

    def take_forward(self, batch: Any) -> Any:
        """SGLang's ForwardBatch of it, but for its ids; None if it is not prepared."""

    def settle(self) -> None:
        """To the state that upstream has now."""

    def behind_launch(self) -> None:
        """What the launch did not need."""


def forward_stream(scheduler: Any) -> AbstractContextManager[Any]:
    """A context of its own each time. SGLang's only one keeps the stream of before in itself: entered within
    itself, it would leave the scheduler on the forward stream."""
    return copy.copy(scheduler.forward_stream_ctx)


class Undecided(Protocol):
    """Provisional decisions about a batch (see dp_metadata.py)."""

    def finish(self) -> None:
        """Make them final, just before a launch."""


class LoopPosition:
    """Iteration number of a scheduler, equal on all stages for the same microbatch.

    All run one loop, with one request list an iteration. Slot = iteration % slots, as upstream's.
    """

    def __init__(self, link: StageLink, slots: int) -> None:
        self.link, self.slots = link, slots
        self.iteration = -1

    @property
    def slot(self) -> int:
        return self.iteration % self.slots


@dataclass(frozen=True)
class Parts:
    """Parts of a pipeline, made by `startup`."""

    scheduler: Any  # SGLang's, of this process
    link: StageLink
    streams: DeviceStreams
    loop: LoopPosition
    reporter: Reporter
    token_return: TokenReturn | None = None  # of the last stage
    metadata: Undecided | None = None  # where attention is data-parallel
    adviser: DepthAdviser | None = None  # of one rank of each stage


class AsyncPipeline:
    """Messages for the microbatch slots of a scheduler."""

    def __init__(self, parts: Parts) -> None:
        self.scheduler, self.link, self.streams = parts.scheduler, parts.link, parts.streams
        self.loop, self.reporter = parts.loop, parts.reporter
        self.token_return, self.metadata = parts.token_return, parts.metadata
        self.adviser = parts.adviser  # until it has measured enough
        trace = self.link.trace
        timed = trace.enabled and self.streams.asynchronous
        self.timer = ForwardTimer(self.streams, trace) if timed else None
        self.early_send = self.link.context.settings.early_send == "1"
        self.unsent: Callable[[], None] | None = None  # sends the proxies of the last launch
        self.launched: dict[int, Launch] = {}
        self.transfers = TransferGate(self.streams, trace)
        self.last_launched: Any = None  # the event behind the last launch
        self.intake = Intake()  # of stage 0
        self.requests: list[Any] = []  # of this iteration
        self.sent_requests: list[Any] | None = None
        self.decisions = SharedDecisions()
        self.ready_counts = ReadyCounts(self.link.stages)  # of a hierarchical cache, on stage 0
        self.reported_counts: Counts = ()  # to stage 0, less what it has decided since
        self.ahead: Prepared | None = None  # of stage 0, once its loop begins
        self.waits_last = False  # for proxies, when all else of a forward is ready
        self.first_free_pages: list[Any] = []  # tensors of another stream, kept for ever

    @property
    def is_last(self) -> bool:
        return self.link.stage == self.link.stages - 1

    @property
    def iteration(self) -> int:
        return self.loop.iteration

    @property
    def slot(self) -> int:
        return self.loop.slot

    def begin_iteration(self) -> None:
        self.loop.iteration += 1
        self.decisions.this_iteration = None
        if self.timer is not None:
            self.timer.collect()
        self.link.trace.record("iteration", "", self.slot, self.iteration)

    def timing(self, stream: AbstractContextManager[Any], slot: int) -> AbstractContextManager[Any]:
        """Around a launch on `stream`: device times of the forward, while tracing."""
        return nullcontext() if self.timer is None else self.timer.around(stream, slot, self.iteration)

    def send_requests(self) -> None:
        """Push this iteration's requests and decisions to the next stage, once."""
        if self.is_last or self.sent_requests is self.requests:
            return
        self.sent_requests = self.requests
        requests = self.decisions.pass_on(self.requests)
        self.link.push(Kind.REQUESTS, self.link.stage + 1, requests or None, iteration=self.iteration)

    def receive_requests(self) -> list[Any]:
        pending = self.link.post(Kind.REQUESTS, self.link.stage - 1, iteration=self.iteration)
        requests = pending.wait_values() or []
        self.link.refuse_leftovers(Kind.PROXY, self.link.stage - 1, self.iteration)
        return self.decisions.take(requests)

    def exchange_outcomes(self, outcome: Outcome) -> list[Outcome]:
        """This rank's outcomes of this iteration's control request, by stage."""
        others = [stage for stage in range(self.link.stages) if stage != self.link.stage]
        for stage in others:
            self.link.push(Kind.OUTCOME, stage, outcome, iteration=self.iteration)
        pending = {stage: self.link.post(Kind.OUTCOME, stage, iteration=self.iteration) for stage in others}
        outcomes = {stage: each.wait_values() for stage, each in pending.items()}
        return [outcomes.get(stage, outcome) for stage in range(self.link.stages)]

    def post_proxies(self) -> Pending:
        return self.link.post(
            Kind.PROXY,
            self.link.stage - 1,
            slot=self.slot,
            iteration=self.iteration,
            overtaken_by=Kind.REQUESTS,
        )

    def send_proxies(self, tensors: Mapping[str, Any], batch: str, gather: GatherGroup) -> None:
        """Slices save bandwidth on a link; on one node, copying is cheaper than gathering."""
        following = self.link.stage + 1
        copied = self.link.device_lane is None and self.link.host_lane.is_local(following)
        self.link.push_tensors(
            Kind.PROXY,
            following,
            tensors,
            slot=self.slot,
            iteration=self.iteration,
            batch=batch,
            gather=None if copied else gather,
        )

    def send_unsent(self) -> None:
        """Send the proxies of this iteration's launch, unless they are sent."""
        send, self.unsent = self.unsent, None
        if send is not None:
            send()

    def post_outputs(self, slot: int) -> Pending:
        return self.link.post(
            Kind.OUTPUT,
            self.link.stages - 1,
            slot=slot,
            iteration=self.launched[slot].iteration,
        )

    def close(self) -> None:
        if self.token_return is not None:
            self.token_return.close()
        self.link.close()
