"""Seam: host-device synchronisation of the Ascend attention backend before a forward.

0.5.21 reads sequence lengths from the device (`seq_lens.max()` as the end of a slice,
`extend_seq_lens.cpu()`) and makes a device tensor of a list. Each waits for the forward stream, so for
proxies and all earlier forwards. The host already knows the lengths, and a copy from pinned memory does not
wait.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_npu_pp.host_copies import Uploads
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.streams import DeviceStreams

from .pipeline import current

_BACKEND = "sglang.srt.hardware_backend.npu.attention.ascend_backend:AscendAttnBackend"


class WithoutWaiting(Uploads):
    """Makes reads of lengths asynchronous inside the block, too.

    For one batch `seq_lens.max()` and `extend_seq_lens.cpu()`, lengths of shape (requests,), return equal CPU
    tensors.
    """

    def __init__(self, forward_batch: Any, streams: DeviceStreams) -> None:
        super().__init__(streams)
        self._seq_lens, self._on_host = forward_batch.seq_lens, forward_batch.seq_lens_cpu
        self._extend, self._extend_on_host = forward_batch.extend_seq_lens, forward_batch.extend_seq_lens_cpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
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
    with WithoutWaiting(forward_batch, current().streams):
        original(backend, forward_batch)


PATCHES = (
    Patch(
        target=f"{_BACKEND}.init_forward_metadata",
        wrapper=init_forward_metadata,
        device="npu",
        why="lengths are read from the device, so the host waits for the proxies and all earlier forwards",
        how="those reads return the host's copies of the same lengths; a list goes through pinned memory",
        upstream="0.5.23 takes the width of the block table from the host itself",
        plan="goes with 0.5.21",
    ),
)
