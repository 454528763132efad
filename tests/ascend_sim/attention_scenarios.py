"""Fused attention on the simulated Ascend, a program with JSON results: `test_attention.py` says which.

Keys and values that no request owns are NaN, so that reading one shows in the result.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ascend_sim import kernels
from ascend_sim.controls import Simulator

DEVICE = "npu:0"
PAGE, HEADS, SHARED, WIDTH, SCALE = 4, 4, 2, 8, 0.3
TASK = "npu_fused_infer_attention_score"


class Paged:
    """A decode step: one row of the query for each request, its keys and values in pages in disorder."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        longest = max(1, *(-(-length // PAGE) for length in lengths))
        pages = torch.randperm(longest * len(lengths))
        self.block_table = pages.view(len(lengths), longest).int()
        self.keys, self.values = torch.full((2, len(pages), PAGE, SHARED, WIDTH), float("nan"))
        for request, length in enumerate(lengths):
            for token in range(length):
                page = self.block_table[request, token // PAGE]
                self.keys[page, token % PAGE] = torch.randn(SHARED, WIDTH)
                self.values[page, token % PAGE] = torch.randn(SHARED, WIDTH)
        self.query = torch.randn(len(lengths), HEADS, WIDTH)

    def expected(self, lengths: Sequence[int]) -> Tensor:
        """[requests, H, D] by PyTorch's own attention; zeros for a request without tokens."""
        rows = []
        for request, length in enumerate(lengths):
            pages = self.block_table[request]
            parts = (cache[pages].flatten(0, 1)[:length] for cache in (self.keys, self.values))
            keys, values = (part.transpose(0, 1).repeat_interleave(HEADS // SHARED, 0) for part in parts)
            query = self.query[request].unsqueeze(1)
            attended = functional.scaled_dot_product_attention(query, keys, values, scale=SCALE)
            rows.append(attended.squeeze(1) if length else torch.zeros(HEADS, WIDTH))
        return torch.stack(rows)

    def arguments(self, layout: str = "BSH") -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """As SGLang calls it."""
        shape = (-1, 1, HEADS * WIDTH) if layout == "BSH" else (-1, 1, HEADS, WIDTH)
        caches = (cache.flatten(2).to(DEVICE) for cache in (self.keys, self.values))
        return (self.query.view(shape).to(DEVICE), *caches), {
            "block_table": self.block_table.to(DEVICE),
            "block_size": PAGE,
            "num_heads": HEADS,
            "num_key_value_heads": SHARED,
            "input_layout": layout,
            "scale": SCALE,
            "sparse_mode": 0,
            "atten_mask": None,
            "actual_seq_lengths_kv": self.lengths,
        }


def npu() -> Any:
    return torch.get_device_module("npu")


def operator() -> Any:
    import torch_npu

    return torch_npu.npu_fused_infer_attention_score


def paged() -> dict[str, float]:
    """How far from the formula, in both layouts."""
    found = {}
    for layout in ("BSH", "BSND"):
        step = Paged([9, 1, 4, 0])
        tensors, options = step.arguments(layout)
        attended, _ = operator()(*tensors, **options)
        found[layout] = _distance(attended, step.expected(step.lengths))
    return found


def into_given_memory() -> dict[str, Any]:
    """The form that graphs capture: with a workspace, which it uses, into tensors that exist."""
    import torch_npu

    step = Paged([9, 1, 4, 0])
    tensors, options = step.arguments()
    workspace = torch_npu._npu_fused_infer_attention_score_get_max_workspace(*tensors, **options)
    workspace.zero_()
    out = [torch.empty_like(tensors[0]), torch.empty(1, device=DEVICE)]
    before = _history_next()
    operator().out(*tensors, **options, workspace=workspace, out=out)
    npu().synchronize()
    return {
        "distance": _distance(out[0], step.expected(step.lengths)),
        "workspace was used": bool(workspace.any().item()),
        "tasks": _tasks_since(before)[:1],
    }


def lengths_are_read_at_the_call() -> float:
    """They change behind the call, while the task stands at a gate: the result is that of the call."""
    step = Paged([9, 3])
    tensors, options = step.arguments()
    npu().synchronize()
    with Simulator(os.getpid()) as simulator, simulator.hold(TASK, count=1) as gate:
        attended, _ = operator()(*tensors, **options)
        step.lengths[:] = [1, 1]
        gate.wait_until_held()
    return _distance(attended, step.expected([9, 3]))


def vision_tower() -> float:
    """Several sequences one behind the other, without pages."""
    query, key, value = torch.randn(3, 10, HEADS, WIDTH)
    ends = [4, 5, 10]
    on_device = (part.to(DEVICE) for part in (query, key, value))
    found, _ = operator()(
        *on_device,
        actual_seq_lengths=ends,
        actual_seq_lengths_kv=ends,
        num_heads=HEADS,
        num_key_value_heads=HEADS,
        scale=SCALE,
        sparse_mode=0,
        input_layout="TND",
    )
    expected = []
    for begin, end in itertools.pairwise([0, *ends]):
        q, k, v = (part[begin:end].transpose(0, 1) for part in (query, key, value))
        attended = functional.scaled_dot_product_attention(q, k, v, scale=SCALE)
        expected.append(attended.transpose(0, 1))
    return _distance(found, torch.cat(expected))


def refusals() -> dict[str, str]:
    """What it says to arguments that it does not compute."""
    changes: dict[str, dict[str, Any]] = {
        "layout": {"input_layout": "BNSD"},
        "no pages": {"block_table": None},
        "mask": {"atten_mask": torch.ones(4, 1, 8, dtype=torch.bool, device=DEVICE)},
        "sparse mode": {"sparse_mode": 3},
        "too few lengths": {"actual_seq_lengths_kv": [9, 1, 4]},
        "too long": {"actual_seq_lengths_kv": [9, 1, 4, 99]},
        "block size": {"block_size": 2 * PAGE},
    }
    tensors, options = Paged([9, 1, 4, 0]).arguments()
    return {name: _refused(tensors, {**options, **change}) for name, change in changes.items()}


def _refused(tensors: Sequence[Tensor], options: dict[str, Any]) -> str:
    try:
        operator()(*tensors, **options)
    except NotImplementedError as error:
        return str(error).partition("\n")[0]
    return "no error"


def _distance(found: Tensor, expected: Tensor) -> float:
    on_host = found.cpu().view(expected.shape)
    return float("inf") if on_host.isnan().any() else (on_host - expected).abs().max().item()


def _history_next() -> int:
    npu().synchronize()
    with Simulator(os.getpid()) as simulator:
        return simulator.history().next


def _tasks_since(start: int) -> list[str]:
    with Simulator(os.getpid()) as simulator:
        return [entry.task for entry in simulator.history(start).entries if entry.event == "began"]


def main(names: Sequence[str]) -> None:
    torch.manual_seed(0)
    kernels.install()
    json.dump({name: globals()[name]() for name in names}, sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
