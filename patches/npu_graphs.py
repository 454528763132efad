"""Seam: decode with NPU graphs, without a wait of the host for the device in every step.

A graph's attention waits for an event that its update records, and clears it; the update, on a stream of its
own, first gives that attention the lengths of the step. So an update must not begin before the previous
replay has ended: otherwise that replay computes with the next step's lengths, and the next one waits for an
event that was recorded once and cleared once. Upstream's host sees to it: it waits for the previous replay
(0.5.21 and later), or reads the lengths from the device behind it. Here the update's stream waits, and the
lengths come from the host, where they are known.

Order on the device, of step i: inputs copied, replay i launched, proxies packed or outputs taken, all on the
forward stream; the update's stream waits for replay i-1, updates layer by layer; layer by layer replay i
goes on. The lengths of an update are a list, which torch_npu copies in the call: no memory of the host is
read later.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.overrides import TorchFunctionMode

from sglang_npu_pp.patching import Patch
from sglang_npu_pp.streams import Event

from .pipeline import current

_NPU = "sglang.srt.hardware_backend.npu.graph_runner"
_RUNNER = f"{_NPU}.npu_graph_runner:NPUGraphRunner"
_BACKEND = f"{_NPU}.npu_cudagraph_backend:NPUCudaGraphBackend"


class LengthsFromHost(TorchFunctionMode):
    """Inside the block `.cpu()` of one batch's lengths returns the host's equal copy."""

    def __init__(self, forward_batch: Any) -> None:
        super().__init__()
        self._seq_lens, self._on_host = forward_batch.seq_lens, forward_batch.seq_lens_cpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.cpu and args[0] is self._seq_lens and self._on_host is not None:
            return self._on_host[: len(self._seq_lens)]
        return function(*args, **(kwargs or {}))


def execute(original: Any, runner: Any, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
    if not forward_batch.forward_mode.is_decode_or_idle():  # a speculative one may know its lengths later
        return original(runner, forward_batch, *arguments, **options)
    with LengthsFromHost(forward_batch):
        return original(runner, forward_batch, *arguments, **options)


def replay_with_input_update(
    original: Any, backend: Any, shape_key: Any, *arguments: Any, **options: Any
) -> Any:
    replayed = _replayed.get(backend) or current().streams.record()  # the first time: all that was launched
    _let_updates_wait_for(replayed, backend._graphs[shape_key])
    backend._rebind_fence = None  # what the host would wait for, in 0.5.21 and later
    output = original(backend, shape_key, *arguments, **options)
    _replayed[backend] = current().streams.record()
    return output


def _let_updates_wait_for(replayed: Any, graph: Any) -> None:
    """The stream of updates; the host, where a torch_npu has no such stream."""
    stream = getattr(getattr(graph, "graph_dispatch_mode", None), "update_stream", None)
    if stream is None:
        replayed.synchronize()
    else:
        stream.wait_event(replayed)


_replayed: WeakKeyDictionary[Any, Event] = WeakKeyDictionary()  # of each backend: behind its last replay

_UPSTREAM = "vllm-ascend #16798 lets the stream of updates wait; #4233 shows the hang without any wait"

PATCHES = (
    Patch(
        target=f"{_RUNNER}.execute",
        wrapper=execute,
        device="npu",
        why="lengths are read from the device, so the host waits for the proxies and all earlier forwards "
        "before it launches a replay",
        how="that read returns the host's copy of the same lengths",
        upstream="0.5.23 takes the lengths from the host itself",
        plan="goes with 0.5.22",
        optional=True,
    ),
    Patch(
        target=f"{_BACKEND}.replay_with_input_update",
        wrapper=replay_with_input_update,
        device="npu",
        why="before lengths in a graph are changed the host waits for the previous replay, in 0.5.21 and "
        "later; before, only the read above protects that replay",
        how="the stream of updates waits for it",
        upstream=_UPSTREAM,
        plan="goes when upstream's fence is one of streams",
        optional=True,
        relies_on=(
            f"{_RUNNER}._get_update_attr_type",
            "sglang.srt.hardware_backend.npu.attention.ascend_backend:AscendAttnBackend.forward_decode_graph",
        ),
    ),
)
