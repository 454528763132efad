"""Patches: applied all or nothing, and undone; the fingerprints of what they replace."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.fingerprints import fingerprint_in_file
from sglang_npu_pp.patches import PATCHES, load_contracts, seams_here, sglang_release
from sglang_npu_pp.patching import (
    AppliedPatches,
    Patch,
    contract_targets,
    fingerprint,
)

UPSTREAM = '''
import functools

def decorate(function):
    @functools.wraps(function)
    def decorated(*args):
        return function(*args)

    return decorated

def plain(value):
    return value + 1

class Scheduler:
    @decorate
    def step(self, value):
        """Docstring."""
        return value * 2

    @classmethod
    def name(cls, value):
        return cls.__name__ + value

    @staticmethod
    def fixed():
        return 0

class Heir(Scheduler):
    pass
'''


@pytest.fixture
def upstream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A small module in the place of SGLang."""
    (tmp_path / "fake_upstream.py").write_text(UPSTREAM)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("fake_upstream")
    sys.modules.pop("fake_upstream", None)


def patch(target: str, wrapper: Any, **options: Any) -> Patch:
    return Patch(target=target, wrapper=wrapper, why="w", how="h", upstream="u", plan="p", **options)


STEP = patch("fake_upstream:Scheduler.step", lambda original, self, value: original(self, value) + 100)
PLAIN = patch("fake_upstream:plain", lambda original, value: -original(value))
NAME = patch("fake_upstream:Scheduler.name", lambda original, cls, value: "our " + original(cls, value))
ADDED = patch("fake_upstream:Scheduler.extra", lambda self: "extra", adds=True, relies_on=(STEP.target,))


def test_patches_apply_and_undo(upstream: Any) -> None:
    before = upstream.Scheduler.step
    applied = AppliedPatches([STEP, PLAIN, ADDED, NAME])
    assert upstream.Scheduler().step(3) == 106
    assert upstream.Scheduler.name("!") == upstream.Scheduler().name("!") == "our Scheduler!"
    sub: Any = type("Sub", (upstream.Scheduler,), {})
    assert sub.name("!") == "our Sub!"
    assert upstream.plain(1) == -2
    assert upstream.Scheduler().extra() == "extra"
    applied.undo()
    assert upstream.Scheduler.step is before
    assert upstream.Scheduler.name("!") == "Scheduler!"
    assert upstream.plain(1) == 2
    assert not hasattr(upstream.Scheduler, "extra")


@pytest.mark.parametrize("target", ["fake_upstream:Scheduler.fixed", "fake_upstream:Scheduler.missing"])
def test_when_one_patch_fails_none_is_in_force(upstream: Any, target: str) -> None:
    before = upstream.Scheduler.step
    with pytest.raises(ContractError, match=f"^The patch of {target} could not be applied"):
        AppliedPatches([STEP, PLAIN, ADDED, patch(target, lambda original: 1)])
    assert upstream.Scheduler.step is before
    assert upstream.plain(1) == 2
    assert not hasattr(upstream.Scheduler, "extra")


@pytest.mark.parametrize("target", ["plain", "Scheduler.step", "decorate"])
def test_fingerprints_of_the_file_and_of_the_process_are_equal(upstream: Any, target: str) -> None:
    assert fingerprint(f"fake_upstream:{target}") == fingerprint_in_file(UPSTREAM, target)


def test_a_function_that_another_plugin_has_wrapped_is_named(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source, as `inspect` finds it, is still upstream's."""
    original = upstream.plain

    @functools.wraps(original)
    def timed(value: Any) -> Any:
        return original(value)

    monkeypatch.setattr(upstream, "plain", timed)
    with pytest.raises(
        ContractError, match=rf"fake_upstream:plain is wrapped by .* \({__file__}, line \d+; another plugin\?"
    ):
        fingerprint("fake_upstream:plain")


def test_what_is_not_there_has_no_fingerprint(upstream: Any) -> None:
    names = (
        "fake_upstream:gone",
        "fake_upstream:Scheduler.gone",
        "fake_upstream:Heir.step",
        "no_such_module:gone",
    )
    for target in names:
        assert fingerprint(target) is None


# --- our patches and the installed SGLang (other releases: test_releases.py) ---------------------


@pytest.mark.parametrize("target", contract_targets(PATCHES))
def test_the_fingerprint_script_reads_what_the_process_has(target: str) -> None:
    module, _, qualname = target.partition(":")
    package, _, name = module.rpartition(".")
    while (specification := importlib.util.find_spec(package)) is None or specification.origin is None:
        package, _, parent = package.rpartition(".")  # a folder without __init__.py has no origin
        name = f"{parent}/{name}"
    path = Path(specification.origin).parent / f"{name}.py"
    found = fingerprint_in_file(path.read_text(), qualname) if path.exists() else None
    if load_contracts()[sglang_release()][target] is None:
        assert found is None
    elif target in {target for seam in seams_here() for target in seam.targets}:
        assert found == fingerprint(target)
    else:  # its module cannot be imported on this device
        assert found == load_contracts()[sglang_release()][target]


def test_every_patch_says_why_and_until_when() -> None:
    for each in PATCHES:
        for text in (each.why, each.how, each.upstream, each.plan):
            assert text.strip(), each.target
    assert len({each.target for each in PATCHES}) == len(PATCHES)
