"""Streams and events of an accelerator, with the same interface on CPU, where calls return complete.

torch hands out the streams of a device in turn (CUDA and torch_npu 2.13: 32), so a new stream is an old one
after a while. If forwards or their collectives use it, it holds up what is to run beside them.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist

_MOST_STREAMS = 128  # of a device, more than any pool of torch has

_ours: weakref.WeakSet[Any] = weakref.WeakSet()  # streams of `new_stream` that are still in use


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
        """A stream apart from those that this process is known to use, where there is one left."""
        if not self.asynchronous:
            return None
        self.make_way(1)
        stream = self._module.Stream()
        _ours.add(stream)
        return stream

    def make_way(self, streams: int) -> None:
        """Let the next `streams` that torch hands out be unused, where there are such ones: a communicator
        takes its own."""
        if not self.asynchronous:
            return
        order, taken = self._pool(), self._used()
        used = [stream in taken for stream in order] * 2
        for start in range(len(order)):
            if not any(used[start : start + streams]):
                return
            self._module.Stream()

    def _pool(self) -> list[int]:
        """The streams of the pool, the one that comes next first."""
        order = [self._module.Stream().stream_id]
        while len(order) < _MOST_STREAMS:
            stream = self._module.Stream().stream_id
            if stream == order[0]:
                break
            order.append(stream)
        return order[1:] + order[:1]

    def _used(self) -> set[int]:
        known = {self._module.current_stream(), self._module.default_stream(), *_ours}
        ids: set[int] = {stream.stream_id for stream in known}
        for group in dist.distributed_c10d._world.pg_map if dist.is_initialized() else ():
            with contextlib.suppress(AttributeError, RuntimeError):  # HCCL tells its streams, others do not
                backend: Any = group._get_backend(self.device)
                stream_id = backend._get_stream_id
                ids |= {stream_id(False, -1), *(stream_id(True, peer) for peer in range(group.size()))}
        return ids

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
