"""Patches: checked against the release, applied all or nothing, and undone."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.fingerprints import fingerprint_in_file
from sglang_npu_pp.patches import PATCHES, load_contracts, patches_here, sglang_release
from sglang_npu_pp.patching import (
    AppliedPatches,
    Patch,
    check_contracts,
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


GONE = "fake_upstream:Scheduler.gone"  # in another release
OPTIONAL = patch(GONE, lambda original, self: None, optional=True, relies_on=(PLAIN.target,))
UNLESS = patch("fake_upstream:decorate", lambda original, function: original(function), unless=GONE)


def contract() -> dict[str, dict[str, str | None]]:
    targets = contract_targets([STEP, PLAIN, ADDED, UNLESS])
    return {"1.0": {target: None if target == GONE else fingerprint(target) for target in targets}}


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


def test_a_known_release_is_accepted(upstream: Any) -> None:
    assert check_contracts([STEP, PLAIN, ADDED], "1.0", contract()) == (STEP, PLAIN, ADDED)


def test_a_release_gets_the_patches_that_it_needs(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_contracts([OPTIONAL, UNLESS], "1.0", contract()) == (UNLESS,)
    monkeypatch.setattr(upstream.Scheduler, "gone", upstream.plain, raising=False)
    other = {"2.0": {**contract()["1.0"], GONE: fingerprint(GONE)}}
    assert check_contracts([OPTIONAL, UNLESS], "2.0", other) == (OPTIONAL,)


@pytest.mark.parametrize("needing", [OPTIONAL, UNLESS, patch(STEP.target, None, relies_on=(GONE,))])
def test_a_function_that_this_release_should_not_have_is_named(
    upstream: Any, monkeypatch: pytest.MonkeyPatch, needing: Patch
) -> None:
    known = contract()
    monkeypatch.setattr(upstream.Scheduler, "gone", upstream.plain, raising=False)
    with pytest.raises(ContractError, match=r"calls itself 1\.0, but fake_upstream:Scheduler\.gone differs"):
        check_contracts([needing], "1.0", known)


def test_a_release_without_a_function_that_must_be_replaced_is_refused(upstream: Any) -> None:
    with pytest.raises(ContractError, match=r"^SGLang 1\.0 has no fake_upstream:Scheduler\.gone"):
        check_contracts([patch(GONE, None)], "1.0", contract())


def test_a_function_that_the_contract_does_not_mention_is_named(upstream: Any) -> None:
    with pytest.raises(ContractError, match=r"but fake_upstream:plain differs"):
        check_contracts([PLAIN], "1.0", {"1.0": {}})


def test_an_unknown_release_is_refused_with_those_that_are_known(upstream: Any) -> None:
    with pytest.raises(ContractError, match=r"SGLang 2\.0 is not a release .* \(1\.0\)"):
        check_contracts([STEP], "2.0", contract())


def test_a_changed_function_is_named(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = contract()

    def step(self: Any, value: Any) -> Any:
        return value * 3

    monkeypatch.setattr(upstream.Scheduler, "step", step)
    with pytest.raises(ContractError, match=r"calls itself 1\.0, but fake_upstream:Scheduler\.step differs"):
        check_contracts([STEP, PLAIN], "1.0", known)


def test_a_function_that_another_plugin_has_wrapped_is_named(
    upstream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its source, as `inspect` finds it, is still upstream's."""
    known = contract()
    original = upstream.plain

    @functools.wraps(original)
    def timed(value: Any) -> Any:
        return original(value)

    monkeypatch.setattr(upstream, "plain", timed)
    with pytest.raises(
        ContractError, match=rf"fake_upstream:plain is wrapped by .* \({__file__}, line \d+; another plugin\?"
    ):
        check_contracts([STEP, PLAIN], "1.0", known)


def test_a_function_that_is_gone_is_named(upstream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    known = contract()
    monkeypatch.delattr(upstream, "plain")
    with pytest.raises(ContractError, match="fake_upstream:plain does not exist"):
        check_contracts([STEP, PLAIN], "1.0", known)


def test_a_method_that_upstream_has_by_now_is_not_added(upstream: Any, monkeypatch: Any) -> None:
    known = contract()
    monkeypatch.setattr(upstream.Scheduler, "extra", lambda self: "theirs", raising=False)
    with pytest.raises(ContractError, match=r"already has fake_upstream:Scheduler\.extra"):
        check_contracts([ADDED], "1.0", known)


@pytest.mark.parametrize("target", ["plain", "Scheduler.step", "decorate"])
def test_fingerprints_of_the_file_and_of_the_process_are_equal(upstream: Any, target: str) -> None:
    assert fingerprint(f"fake_upstream:{target}") == fingerprint_in_file(UPSTREAM, target)


# --- our patches and the installed SGLang (other releases: test_releases.py) ---------------------


def test_the_installed_sglang_is_a_release_that_we_know() -> None:
    check_contracts(patches_here(), sglang_release(), load_contracts())


@pytest.mark.parametrize(
    "release", ["0.5.24", "0.6.0", "0.5.23.post1", "0.5.23rc1", "0.5.24.dev3+g1234abc", "0.0.0.dev0"]
)
def test_a_release_that_only_looks_like_a_known_one_is_refused(release: str) -> None:
    with pytest.raises(ContractError, match=rf"SGLang {re.escape(release)} is not a release .* 0\.5\.23\)"):
        check_contracts(patches_here(), release, load_contracts())


@pytest.mark.parametrize("target", contract_targets(PATCHES))
def test_the_fingerprint_script_reads_what_the_process_has(target: str) -> None:
    module, _, qualname = target.partition(":")
    package, _, name = module.rpartition(".")
    while (specification := importlib.util.find_spec(package)) is None or specification.origin is None:
        package, _, parent = package.rpartition(".")  # a folder without __init__.py has no origin
        name = f"{parent}/{name}"
    source = (Path(specification.origin).parent / f"{name}.py").read_text()
    found = fingerprint_in_file(source, qualname)
    if load_contracts()[sglang_release()][target] is None:
        assert found is None
    elif target in contract_targets(patches_here()):
        assert found == fingerprint(target)
    else:  # its module cannot be imported on this device
        assert found == load_contracts()[sglang_release()][target]


def test_patches_of_another_device_are_left_out() -> None:
    left_out = {patch.device for patch in PATCHES} - {patch.device for patch in patches_here()}
    assert left_out == {"npu"}


def test_every_patch_says_why_and_until_when() -> None:
    for each in PATCHES:
        for text in (each.why, each.how, each.upstream, each.plan):
            assert text.strip(), each.target
    assert len({each.target for each in PATCHES}) == len(PATCHES)
