"""KV chunks queued before they are computed: the transfer thread waits, not the scheduler.

Each chunk has an event of its forward (`TransferGate`) and an asynchronous copy of its page numbers
(`LateIndices`).

Ideas: SGLang 0.5.22 (event for prefixes under overlap scheduling), 0.5.23 (event for page numbers on CUDA);
fresh events, since a reused one races (vllm #39115).
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
    """Integers being copied to the host: known count; `wait`, and any use as an array, returns the values."""

    def __init__(self, indices: torch.Tensor, streams: DeviceStreams) -> None:
        """Start copying `indices`, shape (count,), on the current stream."""
        self._streams = streams
        self._source: torch.Tensor | None = indices  # lives until it is copied
        self._on_host = torch.empty(
            indices.shape, dtype=indices.dtype, device="cpu", pin_memory=streams.pinned
        )
        if streams.pinned:
            self._on_host.copy_(indices, non_blocking=True)
        self._passed = streams.record()  # behind the copy, or what it copies

    def wait(self) -> npt.NDArray[Any]:
        source = self._source
        if source is not None:
            self._passed.synchronize()
            if not self._streams.pinned:  # a copy that blocks, in the transfer thread
                with self._streams.apart():
                    self._on_host.copy_(source)
            self._source = None
        return self._on_host.numpy()

    def __len__(self) -> int:
        return len(self._on_host)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.wait(), dtype=dtype)

    def __getitem__(self, index: Any) -> Any:
        return self.wait()[index]


class TransferGate:
    """Attaches an event to every chunk queued inside `behind`; its taker waits."""

    def __init__(self, streams: DeviceStreams, trace: Trace) -> None:
        self.streams, self._trace = streams, trace
        self._queuing = threading.local()  # .event: of the block that this thread is in
        self._taking = threading.local()  # .adopted: this thread has the device

    @contextmanager
    def behind(self, written: Event) -> Iterator[None]:
        """Chunks queued by this thread inside are not read before `written` has passed."""
        before = getattr(self._queuing, "event", None)
        self._queuing.event = written
        try:
            yield
        finally:
            self._queuing.event = before

    def queued(self, chunk: Any) -> None:
        """Called before a chunk is queued."""
        event = getattr(self._queuing, "event", None)
        if event is not None:
            setattr(chunk, _EVENT, event)
            self._trace.record("chunk_queued")

    def taken(self, chunk: Any) -> None:
        """Called in the taking thread. Waits."""
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
