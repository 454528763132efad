"""Seam: LoRA adapters that may run next.

A drainer blocks some adapters while requests of others have waited too long, by each rank's clock. With
overlapped loading an adapter runs after its copy to the device, by each rank's event.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sglang_npu_pp.patching import Patch, with_names

from .pipeline import current

_DRAINER = "sglang.srt.lora.lora_drainer:LoRADrainer"
_LOADER = "sglang.srt.lora.lora_overlap_loader:LoRAOverlapLoader"
_SINCE = "sglang_npu_pp_waits_since"  # attribute of a request: when stage 0 had it waiting first
_NO_TIME_S = 1e-9  # separates those with the same time of stage 0


def update_adapter_stats(
    original: Any, drainer: Any, waiting_queue: Sequence[Any], running_reqs: Sequence[Any]
) -> None:
    """As upstream, then the longest waits by stage 0's time; a set's order would break ties differently in
    every process."""
    original(drainer, waiting_queue, running_reqs)
    pipeline = current()
    for stats in drainer.adapter_to_stats.values():
        stats.max_wait_time_secs = 0.0
    for place, request in enumerate(waiting_queue):
        if not hasattr(request, _SINCE):
            setattr(request, _SINCE, pipeline.decisions.now)
        waited = pipeline.decisions.now - getattr(request, _SINCE) - place * _NO_TIME_S
        stats = drainer.adapter_to_stats[request.lora_id]
        stats.max_wait_time_secs = max(stats.max_wait_time_secs, waited)


def update_draining_loras(original: Any, drainer: Any, running_reqs: Sequence[Any]) -> None:
    """Among adapters with equally few tokens left, the same on all ranks."""
    with_names(original, min=_first_smallest)(drainer, running_reqs)


def _first_smallest(names: Iterable[Any], key: Callable[[Any], Any]) -> Any:
    return builtins.min(sorted(names, key=str), key=key)


def try_overlap_load_lora(
    original: Any, loader: Any, lora_id: str | None, running_loras: set[str | None]
) -> bool:
    """Room decides, not this rank's copy."""
    if not loader.lora_manager.validate_lora_batch({lora_id} | running_loras):
        return False
    if not original(loader, lora_id, running_loras):
        _wait_for_copies(loader)
        loaded = original(loader, lora_id, running_loras)
        assert loaded, f"LoRA adapter {lora_id} has room, is copied, and is not loaded"
    return True


def _wait_for_copies(loader: Any) -> None:
    for event in loader.lora_to_overlap_load_event.values():
        event.synchronize()


_WHY = "diverging stages run other requests"
_UPSTREAM = "none: with tensor parallelism alone its ranks may differ in this as well"
_PLAN = "goes when upstream decides on one rank"

PATCHES = (
    Patch(
        target=f"{_DRAINER}._update_adapter_stats",
        wrapper=update_adapter_stats,
        why=f"every rank measures a request's wait by its own clock; {_WHY}",
        how="measures it by the times of stage 0",
        upstream=_UPSTREAM,
        plan=_PLAN,
    ),
    Patch(
        target=f"{_DRAINER}._update_draining_loras",
        wrapper=update_draining_loras,
        why=f"between two adapters with equally much to do the order of a set decides; {_WHY}",
        how="by name",
        upstream=_UPSTREAM,
        plan=_PLAN,
    ),
    Patch(
        target=f"{_LOADER}.try_overlap_load_lora",
        wrapper=try_overlap_load_lora,
        why=f"an adapter may run after its copy to the rank's device; {_WHY}",
        how="room decides, then waits for the copy",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_LOADER}._drain_completed_overlap_loads",
            f"{_LOADER}._try_start_overlap_load",
            "sglang.srt.lora.lora_manager:LoRAManager.validate_lora_batch",
        ),
    ),
)
