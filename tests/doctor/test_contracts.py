"""Verdicts of the doctor on the installed SGLang and on others, read from their files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rig.releases import IN_VENV, RELEASES
from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.patches import PATCHES, installed, load_contracts, sglang_release
from sglang_npu_pp.tools.doctor import versions
from sglang_npu_pp.tools.doctor.findings import Finding, Level

CONTRACTS = load_contracts()


def named(findings: list[Finding], subject: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.subject == subject)
    return finding


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


def test_the_installed_sglang_fits() -> None:
    findings = versions.check_patches()
    here = [patch for patch in PATCHES if patch.device is None]
    needed = [patch for patch in here if patch.is_needed(CONTRACTS[IN_VENV])]
    assert findings[0].text == f"{len(needed)} patches would be in force for SGLang {IN_VENV}"
    assert levels(findings) == {Level.OK, Level.NOTE}
    assert len(findings) == len(here) + 1
    text = named(findings, "ModelRunner.init_torch_distributed").text
    assert text == f"{IN_VENV} does not need this patch"


@pytest.mark.parametrize("release", RELEASES)
def test_every_known_release_fits(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = RELEASES[release]
    if not found.is_installed:
        pytest.skip(f"SGLang {release} is not installed (make matrix does it)")
    if found.folder is not None:
        monkeypatch.setattr(sys, "path", [str(found.folder), *sys.path])
        monkeypatch.setattr(installed, "folder", lambda: found.folder / "sglang")
    assert installed.release() == release
    findings = versions.verdicts(PATCHES, release, CONTRACTS, installed.fingerprint)
    assert Level.WRONG not in levels(findings), [each for each in findings if each.level is Level.WRONG]


def test_a_changed_function_is_named_with_every_patch_that_relies_on_it() -> None:
    release = IN_VENV
    changed = "sglang.srt.utils.common:point_to_point_pyobj"

    def read(target: str) -> str | None:
        return "0123456789abcdef" if target == changed else CONTRACTS[release].get(target)

    findings = versions.verdicts(PATCHES, release, CONTRACTS, read)
    wrong = [finding for finding in findings if finding.level is Level.WRONG]
    concerned = [patch for patch in PATCHES if changed in patch.relies_on]
    assert concerned
    assert [each.subject for each in wrong[1:]] == [each.target.partition(":")[2] for each in concerned]
    assert wrong[0].text.startswith(f"{len(concerned)} patches do not fit, so none is applied")
    assert wrong[1].text == f"{changed} differs from SGLang {release}"


def test_a_function_that_upstream_has_by_now_is_not_added() -> None:
    release = IN_VENV
    (added, *_) = (patch for patch in PATCHES if patch.adds)

    def read(target: str) -> str | None:
        return "0123456789abcdef" if target == added.target else CONTRACTS[release].get(target)

    finding = named(versions.verdicts(PATCHES, release, CONTRACTS, read), added.target.partition(":")[2])
    assert finding.level is Level.WRONG
    assert "already has the function" in finding.text


def test_a_release_without_a_function_that_must_be_replaced_is_refused_as_by_the_server() -> None:
    release = IN_VENV
    (patch, *_) = (each for each in PATCHES if each.is_needed(CONTRACTS[release]) and not each.adds)
    without = {release: {**CONTRACTS[release], patch.target: None}}
    assert patch.is_needed(without[release])
    findings = versions.verdicts([patch], release, without, without[release].get)
    assert levels(findings) == {Level.WRONG}
    assert findings[1].text == "this SGLang does not have the function that we would replace"


def test_an_unknown_release_is_named_with_the_sentence_of_the_server() -> None:
    (finding,) = versions.verdicts(PATCHES, "0.6.0", CONTRACTS, lambda target: None)
    assert finding.level is Level.WRONG
    assert finding.text.startswith("SGLang 0.6.0 is not a release that sglang-npu-pp knows (0.5.15, ")


def test_without_sglang_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ContractError, match=r"^SGLang is not installed for this Python"):
        installed.folder()
    (finding,) = versions.check_patches()
    assert finding.level is Level.WRONG


def test_what_is_read_from_files_is_what_the_process_has() -> None:
    """The plugin asks SGLang itself; both must speak of the same release."""
    import sglang

    assert sglang.__file__
    assert installed.folder() == Path(sglang.__file__).parent
    assert installed.release() == sglang_release()
