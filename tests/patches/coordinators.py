"""SGLang's own process groups over gloo, in a rank's process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_NOT_USED = ("pynccl", "mscclpp", "custom_allreduce", "torch_symm_mem_all_reduce")
_OTHER_DEVICES = ("hpu_communicator", "xpu_communicator", "npu_communicator")


def gloo_coordinator(name: str, layout: Sequence[Sequence[int]]) -> Any:
    """A `GroupCoordinator` of this rank's group in `layout`, which every rank calls."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    without = {f"use_{each}": False for each in (*_NOT_USED, *_OTHER_DEVICES)}
    return GroupCoordinator([list(ranks) for ranks in layout], 0, "gloo", group_name=name, **without)
