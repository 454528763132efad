"""Sampled token ids come home: device to pinned memory, and from the last stage to every stage.

The copy to the host is asynchronous and marked by an event of its own; the only thing that ever waits for
it is whoever is about to read the ids. On an accelerator a sending thread does that for the other stages, so
that tokens leave the moment they exist, whatever the scheduler is doing; on CPU they exist already
when the launch returns and are sent at once.

Ideas from vllm-ascend #2788 (pinned copy and event instead of `tolist()`; reverted because its buffer was
sized from an undefined attribute: here every buffer is made for its tensor) and vllm #39115 (a reused
event races: here every step has its own).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from .streams import DeviceStreams, Event
from .transport.message import Kind
from .transport.outbox import Outbox
from .transport.stage_link import StageLink

logger = logging.getLogger("sglang_npu_pp")

PORT = "tokens"
FOR_FIRST_STAGE = (
    "for_first_stage."  # begins the names of outputs that only stage 0 gets, which tells clients
)
LOOK_S = 0.1  # how often the sending thread looks at its connections when it has nothing to send
CLOSE_LIMIT_S = 5.0  # for what is queued when the server ends
ABANDON_LIMIT_S = 1.0  # then, for a sender that waits for room


@dataclass
class HostCopy:
    """Outputs of one microbatch on their way to the host.

    `values` may be read after `wait()`. `sources` are the same outputs on the device, which later work
    reads there; an allocator that does not know of the copy stream must not hand their memory out before.
    """

    values: dict[str, Any]
    ready: Event
    sources: dict[str, Any] = field(default_factory=dict)

    def wait(self) -> dict[str, Any]:
        self.ready.synchronize()
        return self.values


def copy_to_host(
    outputs: Mapping[str, Any], streams: DeviceStreams, copy_stream: Any, produced: Any
) -> HostCopy:
    """Start copying every device tensor in `outputs`, nested lists included, to pinned memory.

    Runs on `copy_stream` behind the event `produced`. On CPU nothing is copied.
    """
    if not streams.asynchronous:
        values = dict(outputs)
        return HostCopy(values, streams.record(), sources=values)
    with streams.use(copy_stream):
        streams.wait_for(produced)
        values = {name: _to_pinned(value) for name, value in outputs.items()}
        return HostCopy(values, streams.record(), sources=dict(outputs))


def _to_pinned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        if value.device.type == "cpu":
            return value
        pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
        return pinned.copy_(value, non_blocking=True)
    if isinstance(value, list | tuple):
        return type(value)(_to_pinned(item) for item in value)
    return value


def upload(tensor: torch.Tensor, streams: DeviceStreams) -> torch.Tensor:
    """`tensor` on the device, ordered on the current stream, without blocking. On CPU `tensor` itself.

    Through pinned memory, because an unpinned copy blocks the host. Every upload has memory of its own,
    which torch's allocator of pinned memory does not hand out again before the copy has passed.
    """
    if not streams.asynchronous:
        return tensor
    return tensor.pin_memory().to(streams.device, non_blocking=True)


@dataclass(frozen=True)
class _Outgoing:
    copy: HostCopy
    slot: int
    iteration: int


class TokenReturn:
    """The last stage's side: sends outputs to every other stage.

    `outboxes` are connections for the sending thread (device outputs), which watches and closes them; None
    sends at once, from the caller's thread, which needs the copies to be complete (CPU). `adopt_thread` is
    called first in the sending thread. What ends the thread is raised by the next call, and by a wait
    for a message meanwhile (`HostLane.watch`).
    """

    def __init__(
        self,
        link: StageLink,
        outboxes: Mapping[int, Outbox] | None,
        adopt_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._link, self._outboxes, self._adopt_thread = link, outboxes, adopt_thread
        self._failure: BaseException | None = None
        self._queue: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        if outboxes is not None:
            link.host_lane.watch(self.check, outboxes.values())
            self._thread = threading.Thread(target=self._run, name="token-return", daemon=True)
            self._thread.start()

    def post(self, copy: HostCopy, slot: int, iteration: int) -> None:
        """Send the outputs of a microbatch to all other stages as soon as they are on the host."""
        self.check()
        outgoing = _Outgoing(copy, slot, iteration)
        if self._thread is None:
            self._send(outgoing)
        else:
            self._queue.put(outgoing)

    def close(self) -> None:
        """Send what is queued and end the thread, which closes its connections; at most some seconds.

        A thread that waits for a device which does not answer cannot be ended: its connections stay, and go
        with the process.
        """
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_LIMIT_S)
        for outbox in (self._outboxes or {}).values():
            outbox.abandon()
        self._thread.join(ABANDON_LIMIT_S)
        if self._thread.is_alive():
            logger.warning(
                "%s: outputs are not on the host after %g s, so they were not sent at the end.",
                self._link.context.where,
                CLOSE_LIMIT_S,
            )

    def _run(self) -> None:
        assert self._outboxes is not None
        try:
            self._adopt_thread()
            while self._send_next():
                pass
        except BaseException as error:
            self._failure = error
        for outbox in self._outboxes.values():
            outbox.close()

    def _send_next(self) -> bool:
        """False at the end. Keeps nothing of what it has sent, tensors of the device among it."""
        outgoing = self._next()
        if outgoing is not None:
            self._send(outgoing)
        return outgoing is not None

    def _next(self) -> _Outgoing | None:
        """What is to be sent; looks at the connections until then. None at the end."""
        assert self._outboxes is not None
        while True:
            with suppress(queue.Empty):
                return self._queue.get(timeout=LOOK_S)
            for outbox in self._outboxes.values():
                outbox.check()

    def _send(self, outgoing: _Outgoing) -> None:
        values = outgoing.copy.wait()
        for_all = {name: value for name, value in values.items() if not name.startswith(FOR_FIRST_STAGE)}
        for peer in range(self._link.stages):
            if peer != self._link.stage:
                self._link.push_tensors(
                    Kind.OUTPUT,
                    peer,
                    for_all if peer else values,
                    slot=outgoing.slot,
                    iteration=outgoing.iteration,
                    owned=True,
                    outboxes=self._outboxes,
                )

    def check(self) -> None:
        """Raise what has ended the sending thread."""
        if self._failure is not None:
            raise self._failure
