"""A probe that takes back every preparation of a decode and compares what is left with what was before.

AHEAD_PROBE_DIR names a folder; `<pid>.ahead` in it is what a scheduler of stage 0 has found so far: how many
preparations it has looked at, of how many something changed when they were made (of all, or the comparison
sees nothing), and the names of what was not as before when they were taken back. Each is made again then.

Of those that are launched it counts the forwards that were planned before their tokens, and names what of
them, or of the metadata of attention and the inputs of graphs, is not as upstream makes it at the launch.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DEPTH = 4
PLAIN = (bool, int, float, str, bytes, type(None))
# Shared by everything; what a preparation could change of them is compared by itself.
SHARED = (
    "tree_cache",
    "model_config",
    "tokenizer",
    "req_to_token_pool",
    "token_to_kv_pool_allocator",
    "_kvcache",
)

Picture = dict[str, Any]
"""Names and values, comparable."""


def register() -> None:
    if not (folder := os.environ.get("AHEAD_PROBE_DIR")):
        return
    from sglang_npu_pp.patches.ahead import Ahead

    found = Found(Path(folder) / f"{os.getpid()}.ahead")
    prepare = Ahead.prepare

    def prepare_twice(ahead: Any, batch: Any, slot: int) -> None:
        before = picture(ahead._scheduler, batch)
        prepare(ahead, batch, slot)
        if ahead._saved is None:
            return
        prepared = picture(ahead._scheduler, batch)
        ahead._saved.restore()
        found.compare(before, prepared, picture(ahead._scheduler, batch))
        ahead._forget()
        prepare(ahead, batch, slot)

    take_forward = Ahead.take_forward

    def take_and_compare(ahead: Any, batch: Any) -> Any:
        planned = take_forward(ahead, batch)
        if planned is not None:
            found.compare_forwards(*both_forwards(ahead._scheduler, batch, planned))
        return planned

    Ahead.prepare = prepare_twice  # type: ignore[method-assign,assignment]
    Ahead.take_forward = take_and_compare  # type: ignore[method-assign,assignment]


class Found:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked_at = self._changed = self._forwards = 0
        self._differences: set[str] = set()

    def compare(self, before: Picture, prepared: Picture, after: Picture) -> None:
        self._looked_at += 1
        self._changed += before != prepared
        self._write(before, after)

    def compare_forwards(self, planned: Picture, at_launch: Picture) -> None:
        self._forwards += 1
        self._write(planned, at_launch)

    def _write(self, one: Picture, other: Picture) -> None:
        self._differences |= {name for name in one | other if one.get(name) != other.get(name)}
        found = {
            "looked at": self._looked_at,
            "changed": self._changed,
            "forwards": self._forwards,
            "differences": sorted(self._differences),
        }
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(found))
        partial.replace(self._path)


def picture(scheduler: Any, batch: Any) -> Picture:
    """All that belongs to a batch, and what hands out its pages and rows."""
    rows = scheduler.req_to_token_pool
    owners = {
        "batch": batch,
        "allocator": scheduler.token_to_kv_pool_allocator,
        "ratio": scheduler.new_token_ratio_tracker,
        **{f"request {request.rid}": request for request in batch.reqs},
    }
    found = {
        f"{owner}: {name}": plain(value) for owner, each in owners.items() for name, value in _state(each)
    }
    taken = zip(batch.reqs, batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)
    for request, row, length in taken:
        found[f"pages of {request.rid}"] = rows.req_to_token[row, :length].tolist()
    cache = scheduler.tree_cache
    return {
        **found,
        "free rows": list(rows.free_slots),
        "cached": (cache.evictable_size(), cache.protected_size()),
        "waiting": [request.rid for request in scheduler.waiting_queue],
    }


def both_forwards(scheduler: Any, batch: Any, planned: Any) -> tuple[Picture, Picture]:
    """What was planned, and the same made now, when its ids are there; both without the ids."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_npu_pp.patches.forwards import options_of_a_launch, plan

    runner = scheduler.model_worker.model_runner
    before = picture_of_forward(runner, planned)
    now = ForwardBatch.init_new(batch, runner, **options_of_a_launch())
    plan(runner, now)
    return before, picture_of_forward(runner, now)


def picture_of_forward(runner: Any, forward: Any) -> Picture:
    found = {f"forward: {name}": plain(value) for name, value in _state(forward) if name != "input_ids"}
    metadata = getattr(runner.attn_backend, "forward_metadata", None)
    if metadata is not None:
        found["attention"] = plain(metadata)
    buffers = getattr(getattr(runner, "decode_cuda_graph_runner", None), "buffers", None)
    for name, value in [] if buffers is None else _state(buffers):
        if name != "input_ids" and isinstance(value, torch.Tensor):
            found[f"graph: {name}"] = plain(value)
    return found


def _state(owner: Any) -> list[tuple[str, Any]]:
    names = vars(owner) if hasattr(owner, "__dict__") else owner.__slots__
    return [(name, getattr(owner, name)) for name in names if name not in SHARED]


def plain(value: Any, depth: int = DEPTH) -> Any:
    """By value as far as it is data; a callable, and what lies deeper, by identity."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.tolist()
    if depth == 0 or isinstance(value, Callable):  # type: ignore[arg-type]
        return id(value)
    if isinstance(value, list | tuple | set | frozenset | array):
        return [plain(each, depth - 1) for each in value]
    if isinstance(value, dict):
        return {plain(key, 0): plain(each, depth - 1) for key, each in value.items()}
    if hasattr(value, "__dict__") or hasattr(value, "__slots__"):
        return [type(value).__name__, [(name, plain(each, depth - 1)) for name, each in _state(value)]]
    return id(value)
