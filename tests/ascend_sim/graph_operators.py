"""An operator that torch_npu's graph dispatcher can update, for the tests of graphs."""

from __future__ import annotations

import torch

from rig.harness import Here


def define_scale(here: Here, *, by_way_of_a_temporary: bool = False) -> None:
    """`graph_tests::scale.out`: a tensor times the first of some numbers, which an update may replace.

    In namespace `graph_tests_temporary`: by way of a tensor of its own.
    """
    namespace = "graph_tests_temporary" if by_way_of_a_temporary else "graph_tests"
    if namespace in here.kept:
        return
    library = here.kept[namespace] = torch.library.Library(namespace, "DEF")
    library.define("scale.out(Tensor x, SymInt[] numbers, *, Tensor(a!) out) -> Tensor(a!)")
    library.impl("scale.out", _scale_twice if by_way_of_a_temporary else _scale, "PrivateUse1")
    _register_handler()


def _register_handler() -> None:
    from torch_npu.npu._npugraph_handlers import npugraph_handler

    if "scale.out" in npugraph_handler._NPU_GRAPH_OP_HANDLERS:
        return

    class ScaleHandler(npugraph_handler.NpuGraphOpHandler):  # type: ignore[misc, unused-ignore]
        UPDATE_SPECS = {"scale.out": [("arg", 1, "numbers")]}  # noqa: RUF012

    npugraph_handler.register_npu_graph_handler(["scale.out"])(ScaleHandler)


def _scale(x: torch.Tensor, numbers: list[int], *, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(x, numbers[0], out=out)


def _scale_twice(x: torch.Tensor, numbers: list[int], *, out: torch.Tensor) -> torch.Tensor:
    return torch.mul(x * numbers[0], 1, out=out)
