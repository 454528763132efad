"""Faults at the boundary of two stages, planted in a running server to see whether a gate notices them.

The file that PP_PROBE_FAULT_FILE names says which fault is in force; it is read at every microbatch, so one
server serves for all. Its text is "<name> <any word>": a new word arms the same fault again. How often it
struck is written beside it, in "<file>.struck".

Planted around `Scheduler.run_batch`: what a later stage computes with, and what the last stage sampled,
whatever brought it there or takes it away, patched or not. "crash of <title>" raises in the scheduler of that
title. Faults that only the patches can have are in sglang_pp_order_faults.py (order and lifetime) and in
sglang_pp_feature_faults.py (drafts, context parallelism, hierarchical cache).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import setproctitle
import torch

NONE = "none"
Tensors = dict[str, torch.Tensor]
RESIDUAL = "residual"
DELAYED_MICROBATCH = 20
HALF_COPIED = "launched before the copy is finished"


def plant(path: Path) -> None:
    """Put the faults around every microbatch of this process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    planted = Planted(path)
    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.run_batch", planted.run_batch, HookType.AROUND
    )
    if os.environ.get("SGLANG_NPU_PP") != "0":
        for faults in ("sglang_pp_order_faults", "sglang_pp_feature_faults"):
            importlib.import_module(faults).plant(planted.fault, planted.note)


class Planted:
    """The faults of one scheduler process."""

    def __init__(self, path: Path) -> None:
        self._path, self._struck_path = path, path.with_name(f"{path.name}.struck")
        self._armed = ""
        self._microbatch = self._struck = 0
        self._earlier: Tensors = {}  # what the previous microbatch brought
        self._deepstack: Any = None

    def run_batch(
        self, original: Callable[..., Any], scheduler: Any, batch: Any, proxies: Any = None, **more: Any
    ) -> Any:
        fault = self.fault()
        if fault.startswith("crash of ") and fault.endswith(setproctitle.getproctitle()):
            raise RuntimeError(fault)
        self._microbatch += 1
        if scheduler.pp_group.is_first_rank:
            self._drop_deepstack(scheduler, fault == "deepstack dropped")
        if hasattr(proxies, "take"):  # ours, which are waited for later
            take = proxies.take
            proxies.take = lambda: self._spoiled(fault, take())
        elif proxies is not None:
            proxies = self._spoiled(fault, proxies)
        result = original(scheduler, batch, proxies, **more)
        if fault == "tokens swapped" and scheduler.pp_group.is_last_rank:
            self._swap(result.next_token_ids)
        return result

    def fault(self) -> str:
        """The fault in force; a new text in the file starts the count of microbatches anew."""
        try:
            armed = self._path.read_text().strip()
        except OSError:
            armed = ""
        if armed != self._armed:
            self._armed, self._microbatch, self._struck = armed, 0, 0
        return armed.rpartition(" ")[0] or NONE

    def _spoiled(self, fault: str, proxies: Any) -> Any:
        return type(proxies)(self._spoil(fault, proxies.tensors))

    def _spoil(self, fault: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the forward gets in the place of `values`, of which most are tensors."""
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        brought = {name: tensor.clone() for name, tensor in tensors.items()}
        earlier, self._earlier = self._earlier, brought
        spoiled = {name: tensor.clone() for name, tensor in brought.items()}
        if self._is_stale(fault) and earlier:
            for name, tensor in spoiled.items():
                rows = min(len(tensor), len(earlier[name]))
                tensor[:rows] = earlier[name][:rows]
            self.note()
        elif fault == HALF_COPIED and earlier:
            for name, tensor in spoiled.items():
                keep_second_half(tensor, earlier[name])
            self.note()
        elif fault in TENSOR_FAULTS:
            TENSOR_FAULTS[fault](spoiled)
            self.note()
        return {**values, **spoiled}

    def _is_stale(self, fault: str) -> bool:
        """Whether this microbatch computes with what the one before it brought."""
        late = (DELAYED_MICROBATCH, DELAYED_MICROBATCH + 1)
        return (
            (fault == "stale every 10th" and self._microbatch % 10 == 0)
            or (fault == "stale every 50th" and self._microbatch % 50 == 0)
            or (fault == "one delayed" and self._microbatch in late)
        )

    def _swap(self, tokens: torch.Tensor) -> None:
        """Two neighbours get each other's token, every 10th microbatch or as soon after it as two differ."""
        differing = (tokens[1:] != tokens[:-1]).nonzero().flatten().tolist()
        if differing and self._microbatch >= 10:
            first = differing[0]
            tokens[first : first + 2] = tokens[first : first + 2].flip(0)
            self._microbatch = 0
            self.note()

    def _drop_deepstack(self, scheduler: Any, drop: bool) -> None:
        """The features that vision layers feed into the first text layers; they live on the first stage."""
        if drop and self._deepstack is None:
            language_model = scheduler.tp_worker.model_runner.model.model
            self._deepstack = language_model.register_forward_pre_hook(self._without, with_kwargs=True)
        elif not drop and self._deepstack is not None:
            self._deepstack.remove()
            self._deepstack = None

    def _without(
        self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("input_deepstack_embeds") is None:
            return args, kwargs
        self.note()
        return args, {**kwargs, "input_deepstack_embeds": None}

    def note(self) -> None:
        """Count a strike; the file is whole whenever it is read."""
        self._struck += 1
        part = self._struck_path.with_name(f"{self._struck_path.name}.{os.getpid()}")
        part.write_text(str(self._struck))
        part.rename(self._struck_path)


def zero_last_row(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor[-1] = 0


def drop_residual(tensors: Tensors) -> None:
    tensors[RESIDUAL].zero_()


def round_to_fp8(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.copy_(tensor.to(torch.float8_e4m3fn).to(tensor.dtype))


def scale(tensors: Tensors) -> None:
    for tensor in tensors.values():
        tensor.mul_(1.01)


def keep_second_half(tensor: torch.Tensor, earlier: torch.Tensor) -> None:
    """Of each row what the buffer held before, as in a forward that does not wait for the copy's end."""
    rows, half = min(len(tensor), len(earlier)), tensor.shape[-1] // 2
    tensor[:rows, ..., half:] = earlier[:rows, ..., half:]


TENSOR_FAULTS: Mapping[str, Callable[[Tensors], None]] = {
    "last row zeroed": zero_last_row,
    "residual dropped": drop_residual,
    "fp8 rounding": round_to_fp8,
    "x 1.01": scale,
}
FAULTS = (
    "stale every 10th",
    "stale every 50th",
    *TENSOR_FAULTS,
    "deepstack dropped",
    "tokens swapped",
    "one delayed",
)
