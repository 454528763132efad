"""Streams and events of the accelerator, with the same words where there is none.

On CPU everything has already happened when a call returns, so a stream orders nothing and an event has always
passed. `DeviceStreams` says that once, and no other module asks which device it is on.
"""

from __future__ import annotations

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
    """Stream operations for one device; `asynchronous` is False where there are no streams (CPU)."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.asynchronous = self.device.type != "cpu"
        self._module: Any = torch.get_device_module(self.device) if self.asynchronous else None

    def new_stream(self) -> Any:
        return self._module.Stream() if self.asynchronous else None

    def adopt_thread(self) -> None:
        """Give the calling thread this device: events are waited for in the context of a device, and a new
        thread has none (NPU) or the first one (CUDA)."""
        if self.asynchronous:
            self._module.set_device(self.device)

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Make `stream` current inside the block."""
        return self._module.stream(stream) if self.asynchronous else nullcontext()

    def record(self) -> Event:
        """A fresh event at the tail of the current stream. Never reused: one event for two steps
        races (vllm #39115)."""
        if not self.asynchronous:
            return PassedEvent()
        return self._record(self._module.Event())

    def record_time(self) -> Any:
        """As `record`, with an event that knows when it passed: `earlier.elapsed_time(later)` is in ms."""
        return self._record(self._module.Event(enable_timing=True))

    def _record(self, event: Any) -> Any:
        event.record(self._module.current_stream())
        return event

    def wait_for(self, event: Any) -> None:
        """Let the current stream, not the host, wait for `event`."""
        if self.asynchronous:
            self._module.current_stream().wait_event(event)
