"""Streams and events of an accelerator, with the same interface on CPU, where calls return complete."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch


class Event(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None: ...

    def query(self) -> bool: ...


class PassedEvent:
    """The event of a device without streams."""

    def synchronize(self) -> None:
        return

    def query(self) -> bool:
        return True


class DeviceStreams:
    """Stream operations of one device; `asynchronous` is False on CPU.

    `pinned`: whether copies to and from the host go through pinned memory.
    """

    def __init__(self, device: torch.device | str, *, pinned: bool = True) -> None:
        self.device = torch.device(device)
        self.asynchronous = self.device.type != "cpu"
        self.pinned = self.asynchronous and pinned
        self._module: Any = torch.get_device_module(self.device) if self.asynchronous else None
        self._kept: list[tuple[torch.Tensor, Event]] = []

    def new_stream(self) -> Any:
        return self._module.Stream() if self.asynchronous else None

    def adopt_thread(self) -> None:
        """Set this device for the calling thread: new threads have none (NPU) or the first (CUDA)."""
        if self.asynchronous:
            self._module.set_device(self.device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Make `stream` current inside the block."""
        return self._module.stream(stream) if self.asynchronous else nullcontext()

    def apart(self) -> AbstractContextManager[Any]:
        """Make a stream of copies current: a copy that blocks waits for all of its stream."""
        return self.use(self._stream_of_copies)

    @functools.cached_property
    def _stream_of_copies(self) -> Any:
        return self.new_stream()

    def keep(self, tensor: torch.Tensor) -> None:
        """Hold `tensor` of another stream's memory until the current stream has come to this point."""
        self._kept = [each for each in self._kept if not each[1].query()]
        self._kept.append((tensor, self.record()))

    def record(self) -> Event:
        """A fresh event in the current stream; a reused one races (vllm #39115)."""
        if not self.asynchronous:
            return PassedEvent()
        return self._record(self._module.Event())

    def record_time(self) -> Any:
        """As `record`, with timing: `earlier.elapsed_time(later)` in ms."""
        return self._record(self._module.Event(enable_timing=True))

    def _record(self, event: Any) -> Any:
        event.record(self._module.current_stream())
        return event

    def wait_for(self, event: Any) -> None:
        """Let the current stream, not the host, wait for `event`."""
        if self.asynchronous:
            self._module.current_stream().wait_event(event)
