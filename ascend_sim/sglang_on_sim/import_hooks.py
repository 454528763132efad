"""What happens while `torch_npu` and the packages around it are imported, without editing any of them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .missing_packages import MissingPackage, is_missing

Action = Callable[[], None]


def install() -> None:
    """Hang the hooks into the import system of this process."""
    sys.meta_path.insert(0, MissingPackageFinder())
    actions = {
        "torch_npu": install_kernels,
        "torch_npu.dynamo.trace_rule": let_dynamo_know_each_function_once,
        "triton.runtime.jit": install_triton_kernels,
    }
    sys.meta_path.insert(0, ActionFinder(actions))
    # Where it finds none, torch_npu puts its own there, which needs the graph engine of a real CANN.
    importlib.import_module("torchair")


class MissingPackageFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds any module below the packages that are not installed here."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not is_missing(name):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return MissingPackage(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        return


class ActionFinder(importlib.abc.MetaPathFinder):
    """Finds modules as usual, and runs an action right behind the code of some of them."""

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self._actions = actions
        self._looking_up: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in self._looking_up or name not in self._actions:
            return None
        self._looking_up.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking_up.remove(name)
        if spec is None or spec.loader is None:
            return None
        run_module, act = spec.loader.exec_module, self._actions[name]

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            act()

        # Looking a module up must do nothing: the action hangs on the loader of this one spec.
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install_kernels() -> None:
    """torch_npu has just been imported: give its operators implementations."""
    from ascend_sim import kernels

    from . import reference_kernels

    kernels.install()
    reference_kernels.install()


def install_triton_kernels() -> None:
    """Triton has just been imported: launch plain torch in the place of its kernels."""
    from . import reference_triton_kernels

    reference_triton_kernels.install()


def let_dynamo_know_each_function_once() -> None:
    """torch_npu is about to tell Dynamo how to trace its functions: torch.cuda's keep the rules they have.

    SGLang lets torch_npu put its functions in the place of torch.cuda's. Two of them, `manual_seed` and
    `manual_seed_all`, then have two names and two rules, for which Dynamo of torch 2.13 raises "Duplicate
    torch object" when it looks one up: at the decorators of SGLang's experts, while they are imported.
    """
    from torch._dynamo.trace_rules import torch_name_rule_map
    from torch_npu.dynamo import trace_rule

    maps: list[Any] = list(torch_name_rule_map)
    of_cuda = {name: rule for rules in maps for name, rule in rules.items()}
    of_npu = trace_rule.torch_non_c_binding_in_graph_functions_npu
    for name, rule in list(of_npu.items()):
        if of_cuda.get(name.replace("torch.npu.", "torch.cuda."), rule) != rule:
            del of_npu[name]
