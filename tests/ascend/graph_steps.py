"""Decode steps of a small graph in a rank's process: SGLang's own backend captures, updates and replays it.

Two layers of attention over a cache whose keys are all equal and whose value of token t is t. So what a layer
gives back, (length - 1) / 2, tells with which length it ran.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch

from rig.harness import Here
from sglang_npu_pp.patches import npu_graphs, pipeline
from sglang_npu_pp.patching import bind
from sglang_npu_pp.streams import DeviceStreams

from . import ranks
from .mutation import Rule, broken

LAYERS, REQUESTS, WIDTH = 2, 2, 16
PAGE, PAGES = 8, 16  # of each request
ATTENTION = "npu_fused_infer_attention_score"
GRAPH = REQUESTS  # the key of the graph


class Steps(NamedTuple):
    """What a rank keeps."""

    backend: Any
    replay: Any  # of the backend, patched or not
    taken: list[tuple[torch.Tensor, Any]]  # of each step: what was packed behind its replay, and the event


def use(here: Here, folder: str) -> None:
    """Import the SGLang of that folder from now on."""
    sys.path.insert(0, folder)


def capture(here: Here, patched: bool) -> None:
    """Capture the graph, as SGLang's runner does at its start."""
    from sglang.srt.hardware_backend.npu.graph_runner import npu_cudagraph_backend

    (patch,) = (each for each in npu_graphs.PATCHES if each.target.endswith("replay_with_input_update"))
    pipeline.set_current(cast(Any, SimpleNamespace(streams=DeviceStreams(here.device))))
    group = SimpleNamespace(barrier=lambda: None)
    runner: Any = SimpleNamespace(
        device_module=ranks.npu(here), model_runner=SimpleNamespace(tp_group=group), tp_group=group
    )
    if hasattr(npu_cudagraph_backend, "get_parallel"):  # 0.5.22 and later
        vars(npu_cudagraph_backend)["get_parallel"] = lambda: SimpleNamespace(tp_group=group)
    backend = npu_cudagraph_backend.NPUCudaGraphBackend(runner)
    with ranks.on_forward_stream(here):
        forward = _Forward(here)
        with backend.capture_session(ranks.npu(here).Stream()):
            backend.capture_one(GRAPH, forward)
    original = npu_cudagraph_backend.NPUCudaGraphBackend.replay_with_input_update
    here.kept["steps"] = Steps(backend, bind(patch, original) if patched else original, [])
    here.kept["forward"] = forward  # a graph keeps no input alive


class _Forward:
    def __init__(self, here: Here) -> None:
        slots = torch.arange(PAGES * PAGE, device=here.device, dtype=torch.float32)
        values = slots.view(1, PAGES, PAGE, 1).expand(REQUESTS, PAGES, PAGE, WIDTH)
        self.values = values.reshape(-1, PAGE, WIDTH).contiguous()
        self.keys = torch.zeros_like(self.values)
        self.query = torch.ones(REQUESTS, 1, WIDTH, device=here.device)
        self.pages = torch.arange(REQUESTS * PAGES, device=here.device, dtype=torch.int32).view(REQUESTS, -1)

    def __call__(self) -> torch.Tensor:
        """[layers, requests]."""
        import torch_npu

        options = {
            "block_table": self.pages,
            "block_size": PAGE,
            "num_heads": 1,
            "num_key_value_heads": 1,
            "input_layout": "BSH",
            "scale": 1.0,
            "actual_seq_lengths_kv": [1] * REQUESTS,
        }
        tensors = self.query, self.keys, self.values
        layers = []
        for _ in range(LAYERS):
            workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(*tensors, **options)
            out = [torch.empty_like(self.query), torch.empty(1, device=self.query.device)]
            torch_npu.npu_fused_infer_attention_score.out(*tensors, **options, workspace=workspace, out=out)
            layers.append(out[0][:, 0, 0])
        return torch.stack(layers)


def step(here: Here, lengths: Sequence[int], rule: Rule | None = None) -> int:
    """Update and replay for each of these lengths; how many steps there were so far."""
    steps: Steps = here.kept["steps"]
    with ranks.on_forward_stream(here), broken(rule):
        for length in lengths:
            output = steps.replay(
                steps.backend,
                GRAPH,
                seq_lens=[length] * REQUESTS,
                attr_name="actual_seq_lengths_kv",
                attr_type=[],
            )
            packed = output.clone()  # before the next replay, as proxies are
            steps.taken.append((packed, ranks.event(here)))
    return len(steps.taken)


def lengths_seen(here: Here, *numbers: int) -> list[list[list[int]]]:
    """Of these steps, for each layer and request: the length with which it ran. Read on another stream than
    the forward stream, where a later replay may stand still."""
    found = []
    with ranks.npu(here).stream(ranks.npu(here).Stream()):
        for number in numbers:
            packed, there = here.kept["steps"].taken[number]
            there.synchronize()
            found.append((packed.cpu() * 2 + 1).round().int().tolist())
    return found


def raise_all_flags(here: Here) -> None:
    """End the wait of a replay whose updates were recorded too early."""
    mode = here.kept["steps"].backend._graphs[GRAPH].graph_dispatch_mode
    for record in mode.graph_dispatch_records:
        record.event.record(mode.update_stream)
