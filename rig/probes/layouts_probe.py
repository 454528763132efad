"""A probe that lets a server on CPU run what SGLang has for accelerators only, and notes its prefills.

Adapters (LoRA) ask for pinned memory. Experts of another rank have the number -1, which indexes nothing on
CPU: here they have no weight. Context-parallel attention has no implementation for the CPU: here
every rank gathers the whole sequence, runs the attention that there is, and keeps its own slice. Dynamic
chunking draws the tokens that it measures from the first 10,000 of the vocabulary, and a tiny model has
fewer; what it measures on a busy machine is no parabola, so its samples are those of one.

With LAYOUTS_PROBE_DIR each scheduler notes every prefill that it launches there, a line of JSON each, as
`<stage>.<rank>.jsonl`: {"requests": [ids], "prefixes": [tokens], "tokens": [tokens], "rows": rows of the
proxies that it sends}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

Function = Callable[..., Any]
VOCABULARY = 500  # of the tiny models, without special tokens

_SIZER = "sglang.srt.managers.scheduler_components.dynamic_chunk_sizer"


def register() -> None:
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        do_without_pinned_memory()
        leave_out_experts_of_other_ranks()
        attend_to_whole_sequences()
    measure_a_parabola()
    if folder := os.environ.get("LAYOUTS_PROBE_DIR"):
        note_prefills(Path(folder))


def do_without_pinned_memory() -> None:
    import torch

    def pageable(function: Function) -> Function:
        def make(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return make

    for name in ("tensor", "empty", "zeros", "ones", "arange"):
        setattr(torch, name, pageable(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]


def leave_out_experts_of_other_ranks() -> None:
    from sglang.srt.layers.moe import fused_moe_native

    compute = fused_moe_native.moe_forward_native

    def moe_forward_native(layer: Any, tokens: Any, choice: Any, config: Any) -> Any:
        """One choice of each token after another: upstream takes no expert twice for a token."""
        elsewhere = choice.topk_ids < 0
        numbers = choice.topk_ids.masked_fill(elsewhere, 0).split(1, dim=1)
        weights = choice.topk_weights.masked_fill(elsewhere, 0).split(1, dim=1)
        return sum(
            compute(layer, tokens, choice._replace(topk_ids=number, topk_weights=weight), config)
            for number, weight in zip(numbers, weights, strict=True)
        )

    fused_moe_native.moe_forward_native = moe_forward_native


def attend_to_whole_sequences() -> None:
    import torch
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.layers.cp.base import get_cp_strategy

    torch.cuda.current_stream = lambda *_: None  # type: ignore[assignment]
    attend = TorchNativeAttnBackend.forward_extend

    def forward_extend(
        backend: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if getattr(batch, "attn_cp_metadata", None) is None:
            return attend(backend, q, k, v, layer, batch, *args, **kwargs)
        strategy = get_cp_strategy()
        whole = (strategy.gather_kv_cache(each.contiguous(), batch) for each in (q, k, v))
        return strategy.shard_hidden_states(attend(backend, *whole, layer, batch, *args, **kwargs), batch)

    TorchNativeAttnBackend.forward_extend = forward_extend


def milliseconds(length: float) -> float:
    """Of a prefill of so many tokens, as its samples say."""
    return float(1e-4 * length * length + 1e-2 * length + 1)


def measure_a_parabola() -> None:
    import numpy as np
    import torch
    from sglang.srt.managers.scheduler_components import dynamic_chunk_sizer
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def randint(low: int, high: int, **kwargs: Any) -> Any:
        return np.random.randint(low, min(high, VOCABULARY), **kwargs)

    def profile(original: Function, sizer: Any) -> tuple[list[int], list[float]]:
        with torch.no_grad():  # as the event loop, which it runs before
            lengths, _ = original(sizer)
        return lengths, [milliseconds(length) for length in lengths]

    drawing = SimpleNamespace(**{**vars(np), "random": SimpleNamespace(randint=randint)})
    dynamic_chunk_sizer.np = drawing
    target = f"{_SIZER}.DynamicChunkSizer._profile_prefill_latency"
    HookRegistry.register(target, profile, HookType.AROUND)


def note_prefills(folder: Path) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def run_batch(original: Function, scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        extends = batch.forward_mode.is_extend()
        prefixes, tokens = list(batch.prefix_lens or ()), list(batch.extend_lens or ())
        result = original(scheduler, batch, *args, **kwargs)
        if extends:
            names = [request.rid for request in batch.reqs]
            line = {"requests": names, "prefixes": prefixes, "tokens": tokens, "rows": rows_of(result)}
            with path_of(folder).open("a") as file:
                file.write(json.dumps(line) + "\n")
        return result

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.run_batch", run_batch, HookType.AROUND)


def path_of(folder: Path) -> Path:
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return folder / f"{parallel.pp_rank}.{parallel.tp_rank}.jsonl"


def rows_of(result: Any) -> int | None:
    proxies = result.pp_hidden_states_proxy_tensors
    return None if proxies is None else len(proxies.tensors["hidden_states"])


def prefills(folder: Path) -> dict[tuple[int, int], Sequence[dict[str, Any]]]:
    """What each rank has noted, by stage and rank. Of a test."""
    return {
        tuple(map(int, path.stem.split("."))): [json.loads(line) for line in path.read_text().splitlines()]  # type: ignore[misc]
        for path in folder.glob("*.*.jsonl")
    }
