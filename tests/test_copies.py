"""Copies of the installed SGLang, spelled otherwise or changed: in force, in part, or not at all."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sglang

from rig.copies import LABEL
from sglang_npu_pp.builds import CORE, Known, read_build
from sglang_npu_pp.fingerprints import fingerprint_on_disk
from sglang_npu_pp.patches import SEAMS, load_contracts
from sglang_npu_pp.patches.features import DISAGGREGATION

pytestmark = pytest.mark.slow

MODULES = sorted({target.partition(":")[0] for seam in SEAMS for target in seam.targets})
LOOP = "sglang.srt.managers.scheduler_pp_mixin"
PREFILL = "sglang.srt.disaggregation.prefill"

Change = Callable[[str, str], str]
"""Of a module: name, text -> text."""


def known_copy(folder: Path, change: Change) -> Known:
    """What is known of a copy whose modules are changed; of the files that matter only."""
    assert sglang.__file__
    for module in MODULES:
        name = module.replace(".", "/") + ".py"
        source, copied = Path(sglang.__file__).parents[1] / name, folder / name
        if source.is_file():
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_text(change(module, source.read_text()))
    build = read_build(LABEL, SEAMS, lambda target: fingerprint_on_disk(target, folder / "sglang"))
    return Known(build, SEAMS, load_contracts())


def replaced(module: str, old: str, new: str) -> Change:
    def change(name: str, text: str) -> str:
        if name != module:
            return text
        assert old in text
        return text.replace(old, new)

    return change


class Respelled(ast.NodeTransformer):
    """Other annotations, other docstrings."""

    def visit_FunctionDef(self, node: Any) -> Any:
        self.generic_visit(node)
        node.returns = ast.Name("Any")
        for argument in node.args.args:
            argument.annotation = ast.Constant("another type")
        if ast.get_docstring(node) is not None:
            node.body[0] = ast.Expr(ast.Constant("Another docstring."))
        return node

    def visit_AsyncFunctionDef(self, node: Any) -> Any:
        return self.visit_FunctionDef(node)


def respelled(module: str, text: str) -> str:
    """Without comments, formatted otherwise."""
    return ast.unparse(ast.fix_missing_locations(Respelled().visit(ast.parse(text))))


def test_another_spelling_is_in_force(tmp_path: Path) -> None:
    found = known_copy(tmp_path, respelled)
    assert found.missing == {}
    assert f"in force for SGLang {LABEL} (functions of 0.5.21), all features" in found.sentence


def test_a_change_elsewhere_is_in_force(tmp_path: Path) -> None:
    def change(module: str, text: str) -> str:
        return f"{text}\n\ndef added_by_a_commit(value):\n    return value + 1\n"

    assert known_copy(tmp_path, change).missing == {}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            'with torch.profiler.record_function("run_batch"):',
            'with torch.profiler.record_function("launch"):',
        ),
        (
            "def _pp_launch_batch(\n        self: Scheduler,\n        mb_id: int,",
            "def _pp_launch_batch(\n        self: Scheduler,\n        slot: int,",
        ),
    ],
    ids=["another constant", "another name"],
)
def test_a_change_in_the_loop_keeps_everything_off(tmp_path: Path, old: str, new: str) -> None:
    """Harmless or not: that is for people, or for a certificate, to say."""
    found = known_copy(tmp_path, replaced(LOOP, old, new))
    assert found.in_force == ()
    assert f"{LOOP}:SchedulerPPMixin._pp_launch_batch differs from SGLang 0.5.21" in found.missing[CORE]
    assert f"SGLang {LABEL} is not a build that sglang-npu-pp knows" in str(found.refusal)


def test_a_change_of_prefill_servers_concerns_them_only(tmp_path: Path) -> None:
    found = known_copy(tmp_path, replaced(PREFILL, "last_chunk: bool = False", "last_chunk: bool = True"))
    assert list(found.missing) == [DISAGGREGATION]
    assert CORE in found.in_force
