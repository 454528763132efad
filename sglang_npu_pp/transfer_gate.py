"""KV chunks that are queued before they are computed: whoever takes one waits, whoever queues it does not.

A prefill server queues a chunk right behind the launch of the forward that writes it. A thread of the
transfer engine takes it from there, and must not read before the forward has run: on a device that is
later. So an event of the forward goes with the chunk, and the thread waits for it (`TransferGate`). Which
pages hold the chunk stands on the device, too; their numbers go with it as a copy on its way
(`LateIndices`).

Ideas from SGLang 0.5.22, which has an event for prefixes under overlap scheduling, and 0.5.23, which has
one for page numbers on CUDA; each event is fresh, since a reused one races (vllm #39115).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .observe.trace import Trace
from .streams import DeviceStreams, Event

_EVENT = "sglang_npu_pp_written"  # attribute of a queued chunk until its event has passed


class LateIndices:
    """Whole numbers on their way to the host: their count is known, `wait` gives the values.

    Anything that needs the values waits for them, so it also works where an array is expected.
    """

    def __init__(self, indices: torch.Tensor, streams: DeviceStreams) -> None:
        """Begins the copy of `indices`, of shape (count,), behind what the current stream has to do."""
        self._source: torch.Tensor | None = indices  # lives until it is copied
        self._on_host = torch.empty(indices.shape, dtype=indices.dtype, device="cpu", pin_memory=True)
        self._on_host.copy_(indices, non_blocking=True)
        self._copied = streams.record()

    def wait(self) -> npt.NDArray[Any]:
        if self._source is not None:
            self._copied.synchronize()
            self._source = None
        return self._on_host.numpy()

    def __len__(self) -> int:
        return len(self._on_host)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.wait(), dtype=dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.wait()[index]


class TransferGate:
    """Ties an event to every chunk that is queued inside `behind`; whoever takes the chunk waits for it."""

    def __init__(self, streams: DeviceStreams, trace: Trace) -> None:
        self.streams, self._trace = streams, trace
        self._queuing = threading.local()  # .event: of the block that this thread is in
        self._taking = threading.local()  # .adopted: this thread has the device

    @contextmanager
    def behind(self, written: Event) -> Iterator[None]:
        """Chunks that this thread queues in the block must not be read before `written` has passed."""
        before = getattr(self._queuing, "event", None)
        self._queuing.event = written
        try:
            yield
        finally:
            self._queuing.event = before

    def queued(self, chunk: Any) -> None:
        """Called for everything that is about to be queued."""
        event = getattr(self._queuing, "event", None)
        if event is not None:
            setattr(chunk, _EVENT, event)
            self._trace.record("chunk_queued")

    def taken(self, chunk: Any) -> None:
        """Called with everything that was taken from the queue, in the thread that did. Waits."""
        event = getattr(chunk, _EVENT, None)
        if event is None:
            return
        if not hasattr(self._taking, "adopted"):
            self.streams.adopt_thread()
            self._taking.adopted = True
        event.synchronize()
        delattr(chunk, _EVENT)
        for name, value in vars(chunk).items():
            if isinstance(value, LateIndices):
                setattr(chunk, name, value.wait())
            elif isinstance(value, list) and any(isinstance(item, LateIndices) for item in value):
                setattr(chunk, name, [_waited(item) for item in value])
        self._trace.record("chunk_taken")


def _waited(value: Any) -> Any:
    return value.wait() if isinstance(value, LateIndices) else value
