"""Seam: what goes between the host and the device before a forward, on an NPU.

The attention backend needs the lengths of the sequences on the host, and 0.5.21 reads them from the device:
the width of the block table is `seq_lens.max()` used as the end of a slice, and `extend_seq_lens` is copied
by `cpu()`. It also makes a device tensor of a list. Positions of multimodal models are copied from memory
that is not pinned. Each makes the host wait for the forward stream, so for every forward before this one, and
the backend's also for the proxies of this microbatch. The host knows the lengths already, and a copy from
pinned memory needs no waiting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.token_return import upload

from .pipeline import current

_BACKEND = "sglang.srt.hardware_backend.npu.attention.ascend_backend:AscendAttnBackend"


class PinnedUploads(TorchFunctionMode):
    """Inside it `torch.tensor(list, device=...)` and, of a tensor on the host, `to(device=...,
    non_blocking=True)` take the way of `upload`."""

    def __init__(self, streams: DeviceStreams) -> None:
        super().__init__()
        self._streams = streams

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # By name, because torch_npu's transfer_to_npu stands something else in the place of torch.tensor.
        if kwargs.get("device") is not None:
            if function.__name__ == "tensor":
                return upload(torch.tensor(args[0], dtype=kwargs.get("dtype")), self._streams)
            if function.__name__ == "to" and args[0].is_cpu and kwargs.get("non_blocking"):
                return upload(args[0].to(kwargs.get("dtype") or args[0].dtype), self._streams)
        return function(*args, **kwargs)


class WithoutWaiting(PinnedUploads):
    """Inside it the lengths of one batch are not read from the device either: `seq_lens.max()` and
    `extend_seq_lens.cpu()`, both lengths of shape (requests,), are answered with CPU tensors of the same
    values."""

    def __init__(self, forward_batch: Any, streams: DeviceStreams) -> None:
        super().__init__(streams)
        self._seq_lens, self._on_host = forward_batch.seq_lens, forward_batch.seq_lens_cpu
        self._extend, self._extend_on_host = forward_batch.extend_seq_lens, forward_batch.extend_seq_lens_cpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            function is torch.Tensor.max
            and len(args) == 1
            and args[0] is self._seq_lens
            and self._on_host is not None
        ):
            return self._on_host.max()
        if function is torch.Tensor.cpu and args[0] is self._extend and self._extend_on_host is not None:
            return torch.tensor(self._extend_on_host, dtype=self._extend.dtype)
        return super().__torch_function__(function, types, args, kwargs)


def init_forward_metadata(original: Any, backend: Any, forward_batch: Any) -> None:
    pipeline = current()
    if pipeline is None:
        original(backend, forward_batch)
        return
    with WithoutWaiting(forward_batch, pipeline.streams):
        original(backend, forward_batch)


def compute_mrope_positions(original: Any, forward_batch: Any, *arguments: Any) -> None:
    pipeline = current()
    if pipeline is None:
        original(forward_batch, *arguments)
        return
    with PinnedUploads(pipeline.streams):
        original(forward_batch, *arguments)


def alloc_extend(
    original: Any,
    allocator: Any,
    prefix_lens: Any,
    prefix_lens_cpu: Any,
    seq_lens: Any,
    seq_lens_cpu: Any,
    last_loc: Any,
    extend_num_tokens: int,
    num_new_pages: int | None = None,
) -> Any:
    if num_new_pages is None and current() is not None:
        pages = [-(-lengths // allocator.page_size) for lengths in (prefix_lens_cpu, seq_lens_cpu)]
        num_new_pages = int((pages[1] - pages[0]).sum())
    return original(
        allocator,
        prefix_lens,
        prefix_lens_cpu,
        seq_lens,
        seq_lens_cpu,
        last_loc,
        extend_num_tokens,
        num_new_pages,
    )


PATCHES = (
    Patch(
        target="sglang.srt.hardware_backend.npu.allocator_npu:NPUPagedTokenToKVPoolAllocator.alloc_extend",
        wrapper=alloc_extend,
        device="npu",
        why="the number of new pages is read from the device in every prefill, behind forwards where they "
        "are on the scheduler's stream",
        how="it is computed from the host's copies of the same lengths, and passed in",
        upstream="other allocators of SGLang compute it on the host",
        plan="goes when the NPU allocator does, too",
    ),
    Patch(
        target="sglang.srt.model_executor.forward_batch_info:ForwardBatch._compute_mrope_positions",
        wrapper=compute_mrope_positions,
        device="npu",
        why="positions of a prefill, and of pictures, are copied from memory that is not pinned: the host "
        "waits for all earlier forwards",
        how="the copies go through pinned memory",
        upstream="ForwardBatch.init_new pins what else it copies",
        plan="goes when upstream pins positions, too",
    ),
    Patch(
        target=f"{_BACKEND}.init_forward_metadata",
        wrapper=init_forward_metadata,
        device="npu",
        why="lengths are read from the device, so the host waits for the proxies and all earlier forwards",
        how="those reads are answered from the host's copies of the same lengths; a list goes through "
        "pinned memory",
        upstream="0.5.23 takes the width of the block table from the host itself",
        plan="goes with 0.5.21",
    ),
)
