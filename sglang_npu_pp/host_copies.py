"""Copies between device and host that block no scheduler, through pinned memory or without.

Ideas: vllm-ascend #2788 (pinned copy, not `tolist()`; reverted, its buffer sized from an undefined
attribute), vllm #39115 (a reused event races).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .streams import DeviceStreams, Event

# With pinned memory (the default) a copy is queued, and an event behind it is waited for. Without it a copy
# blocks, and first waits for all of its stream. So outputs are copied by the thread that needs them first,
# and uploads on a stream without forwards. Copies to and from plain memory are never non-blocking: torch
# promises nothing about when such memory is read or written.


@dataclass
class HostCopy:
    """Outputs of one microbatch in flight to the host: `values`, valid after `wait()`.

    `sources`: the device tensors, held because the allocator ignores the copy stream.
    """

    values: dict[str, Any]
    ready: Event
    sources: dict[str, Any] = field(default_factory=dict)

    def wait(self) -> dict[str, Any]:
        self.ready.synchronize()
        return self.values


class PlainCopy(HostCopy):
    """Without pinned memory: copied by the first thread in `wait`, as a rule that of `TokenReturn`."""

    def __init__(self, outputs: Mapping[str, Any], streams: DeviceStreams, produced: Event) -> None:
        super().__init__({}, produced, sources=dict(outputs))
        self._streams = streams
        self._lock = threading.Lock()
        self._copied = False

    def wait(self) -> dict[str, Any]:
        with self._lock:
            if not self._copied:
                self.ready.synchronize()
                with self._streams.apart():
                    self.values = {
                        name: _copied(each, torch.Tensor.cpu) for name, each in self.sources.items()
                    }
                self._copied = True
        return self.values


def copy_to_host(
    outputs: Mapping[str, Any], streams: DeviceStreams, copy_stream: Any, produced: Any
) -> HostCopy:
    """Start copying device tensors, also in lists, to pinned memory, on `copy_stream` behind `produced`; not
    on CPU."""
    if not streams.asynchronous:
        values = dict(outputs)
        return HostCopy(values, streams.record(), sources=values)
    if not streams.pinned:
        return PlainCopy(outputs, streams, produced)
    with streams.use(copy_stream):
        streams.wait_for(produced)
        values = {name: _copied(value, _to_pinned) for name, value in outputs.items()}
        return HostCopy(values, streams.record(), sources=dict(outputs))


def _copied(value: Any, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.device.type == "cpu" else copy(value)
    if isinstance(value, list | tuple):
        return type(value)(_copied(item, copy) for item in value)
    return value


def _to_pinned(value: torch.Tensor) -> torch.Tensor:
    pinned = torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=True)
    return pinned.copy_(value, non_blocking=True)


def upload(tensor: torch.Tensor, streams: DeviceStreams) -> torch.Tensor:
    """`tensor` on the device, ordered on the current stream, without waiting for it; on CPU itself."""
    if not streams.asynchronous:
        return tensor
    if streams.pinned:
        # Pinned memory of its own: torch reuses it only behind the copy.
        return tensor.pin_memory().to(streams.device, non_blocking=True)
    with streams.apart():
        staged = tensor.to(streams.device)  # it is there when this returns
    # A tensor of the other stream's memory would go back to that stream, whatever still reads it here.
    uploaded = staged.clone()
    streams.keep(staged)
    return uploaded


class Uploads(TorchFunctionMode):
    """Inside the block host tensors and lists reach the device by `upload`: `tensor.to(device=...)` and
    `torch.tensor(list, device=...)`, with these keywords."""

    def __init__(self, streams: DeviceStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        # By name, because torch_npu's transfer_to_npu stands something else in the place of torch.tensor.
        if device is None or torch.device(device).type != self._streams.device.type:
            return function(*args, **kwargs)
        if function.__name__ == "tensor":
            return upload(torch.tensor(args[0], dtype=dtype), self._streams)
        if function.__name__ == "to" and args[0].is_cpu:
            return upload(args[0] if dtype is None else args[0].to(dtype), self._streams)
        return function(*args, **kwargs)
