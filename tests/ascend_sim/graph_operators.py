"""An operator that torch_npu's graph dispatcher can update, for the tests of graphs."""

from __future__ import annotations

import torch

from rig.harness import Here


def define_scale(here: Here) -> None:
    """`graph_tests::scale.out`: a tensor times the first of some numbers, which an update may replace."""
    if "scale" in here.kept:
        return
    from torch_npu.npu._npugraph_handlers.npugraph_handler import (
        NpuGraphOpHandler,
        register_npu_graph_handler,
    )

    library = here.kept["scale"] = torch.library.Library("graph_tests", "DEF")
    library.define("scale.out(Tensor x, SymInt[] numbers, *, Tensor(a!) out) -> Tensor(a!)")
    library.impl("scale.out", _scale, "PrivateUse1")

    @register_npu_graph_handler(["scale.out"])
    class _ScaleHandler(NpuGraphOpHandler):  # type: ignore[misc, unused-ignore]
        UPDATE_SPECS = {"scale.out": [("arg", 1, "numbers")]}  # noqa: RUF012


def _scale(x: torch.Tensor, numbers: list[int], *, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, float(numbers[0]), out=out)
