"""Seam: what the Ascend attention backend does between the host and the device before a forward.

It needs the lengths of the sequences on the host, and 0.5.21 reads them from the device: the width of the
block table is `seq_lens.max()` used as the end of a slice, and `extend_seq_lens` is copied by `cpu()`. It
also makes a device tensor of a list. Each makes the host wait for the forward stream, so for the proxies of
this microbatch and for every forward before it. The host knows the lengths already, and a copy from pinned
memory needs no waiting.
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


class WithoutWaiting(TorchFunctionMode):
    """Inside it three calls of torch do not make the host wait for the device.

    For one batch `seq_lens.max()` and `extend_seq_lens.cpu()`, both lengths of shape (requests,), are
    answered with CPU tensors of the same values; `torch.tensor(list, device=...)` takes the way of `upload`.
    """

    def __init__(self, forward_batch: Any, streams: DeviceStreams) -> None:
        super().__init__()
        self._streams = streams
        self._seq_lens, self._on_host = forward_batch.seq_lens, forward_batch.seq_lens_cpu
        self._extend, self._extend_on_host = forward_batch.extend_seq_lens, forward_batch.extend_seq_lens_cpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # By name, because torch_npu's transfer_to_npu stands something else in the place of torch.tensor.
        if function.__name__ == "tensor" and kwargs.get("device") is not None:
            return upload(torch.tensor(args[0], dtype=kwargs.get("dtype")), self._streams)
        if (
            function is torch.Tensor.max
            and len(args) == 1
            and args[0] is self._seq_lens
            and self._on_host is not None
        ):
            return self._on_host.max()
        if function is torch.Tensor.cpu and args[0] is self._extend and self._extend_on_host is not None:
            return torch.tensor(self._extend_on_host, dtype=self._extend.dtype)
        return function(*args, **kwargs)


def init_forward_metadata(original: Any, backend: Any, forward_batch: Any) -> None:
    with WithoutWaiting(forward_batch, current().streams):
        original(backend, forward_batch)


PATCHES = (
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
