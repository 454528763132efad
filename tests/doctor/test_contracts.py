"""Verdicts of the doctor on the installed SGLang and on others, read from their files."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rig.releases import IN_VENV, RELEASES
from sglang_npu_pp import certificates
from sglang_npu_pp.builds import CORE, Build, Known
from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.patches import PATCHES, SEAMS, installed, load_contracts, sglang_release
from sglang_npu_pp.patches.features import DISAGGREGATION, FEATURES, NPU_BACKEND
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.doctor import versions
from sglang_npu_pp.tools.doctor.findings import Finding, Level

CONTRACTS = load_contracts()
CHANGED = "0123456789abcdef"
COMMON = "sglang.srt.utils.common"


def named(findings: list[Finding], subject: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.subject == subject)
    return finding


def levels(findings: list[Finding]) -> set[Level]:
    return {finding.level for finding in findings}


def verdicts(label: str, release: str = IN_VENV, **changes: str | None) -> list[Finding]:
    return versions.verdicts(known(label, release, **changes))


def known(label: str, release: str = IN_VENV, **changes: str | None) -> Known:
    """Of a build with the functions of a release, and `changes` by the end of the target."""
    functions = {target: CONTRACTS[release].get(target) for seam in SEAMS for target in seam.targets}
    for name, found in changes.items():
        (target,) = (target for target in functions if target.endswith((f".{name}", f":{name}")))
        functions[target] = found
    return Known(Build(label, functions), SEAMS, CONTRACTS)


def test_the_installed_sglang_fits() -> None:
    findings = versions.check_patches(Settings())
    here = [patch for patch in PATCHES if patch.device is None]
    needed = [patch for patch in here if patch.is_needed(CONTRACTS[IN_VENV])]
    text = f"{len(needed)} patches would be in force for SGLang {IN_VENV}, all features"
    assert findings[0].text == text
    assert levels(findings) == {Level.OK, Level.NOTE}
    names = [feature.name for feature in FEATURES if feature.name != NPU_BACKEND]
    assert [finding.subject for finding in findings[1 : len(names) + 1]] == names
    assert len(findings) == 1 + len(names) + len(here)
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
    findings = versions.check_patches(Settings())
    assert levels(findings) == {Level.OK, Level.NOTE}, [
        each for each in findings if each.level is not Level.OK
    ]


def test_a_build_with_another_name_is_known_by_its_functions() -> None:
    findings = verdicts("0.5.24.dev7+gabc", "0.5.23")
    assert levels(findings) == {Level.OK, Level.NOTE}
    assert (
        "would be in force for SGLang 0.5.24.dev7+gabc (functions of 0.5.23), all features"
        in findings[0].text
    )
    assert named(findings, "disaggregation").text == "as in 0.5.23"


def test_a_changed_function_is_named_with_every_patch_that_relies_on_it() -> None:
    findings = verdicts("0.5.99", point_to_point_pyobj=CHANGED)
    changed = "sglang.srt.utils.common:point_to_point_pyobj"
    wrong = [finding for finding in findings if finding.level is Level.WRONG]
    assert [finding.subject for finding in wrong] == ["contract", CORE]
    assert f"SGLang 0.5.99 is not a build that sglang-npu-pp knows: {changed} differs" in wrong[0].text
    assert "SGLang stays as it is" in wrong[0].text
    concerned = [patch for patch in PATCHES if changed in patch.relies_on]
    assert concerned
    warned = [finding for finding in findings if finding.level is Level.WARNING]
    assert [each.subject for each in warned] == [each.target.partition(":")[2] for each in concerned]
    assert warned[0].text == f"{changed} differs from SGLang {IN_VENV}"


def test_a_feature_that_is_not_known_is_a_warning() -> None:
    findings = verdicts("0.5.99", send_kv_chunk=CHANGED)
    assert Level.WRONG not in levels(findings)
    assert "not for disaggregation (" in findings[0].text
    finding = named(findings, "disaggregation")
    assert finding.level is Level.WARNING
    assert "a server that uses it stays upstream's, or does not start with require" in finding.text
    assert "send_kv_chunk differs from SGLang 0.5.21" in finding.text


def test_a_certificate_and_what_it_covers_are_named(tmp_path: Path) -> None:
    unknown = known("0.5.99", send_kv_chunk=CHANGED, point_to_point_pyobj=CHANGED)
    certificates.write(certificates.for_known(unknown, [CORE, DISAGGREGATION]), tmp_path / "own")
    found = certificates.certified(unknown, Settings(certificates=tmp_path / "own"))
    findings = versions.verdicts(found)
    assert levels(findings) == {Level.OK, Level.NOTE}
    covered = ", ".join(found.by_certificate)
    text = f"of SGLang 0.5.99, for core, disaggregation: covers {covered}"
    assert named(findings, "certificate").text == text
    assert named(findings, DISAGGREGATION).text.endswith("; by certificate: disaggregation")
    core = ", ".join(name for name in found.by_certificate if name != DISAGGREGATION)
    assert named(findings, CORE).text == f"as in {IN_VENV}; by certificate: {core}"
    (patch, *_) = (patch for patch in PATCHES if f"{COMMON}:point_to_point_pyobj" in patch.relies_on)
    assert named(findings, patch.target.partition(":")[2]).text == "by certificate"


def test_a_certificate_that_does_not_count_is_an_error_where_all_depends_on_it(tmp_path: Path) -> None:
    for unknown, level in (
        (known("0.5.99", point_to_point_pyobj=CHANGED), Level.WRONG),
        (known("0.5.99", send_kv_chunk=CHANGED), Level.WARNING),
    ):
        certificate = certificates.for_known(unknown, unknown.features)
        certificates.write(certificate, tmp_path / "own").chmod(0o666)
        found = certificates.certified(unknown, Settings(certificates=tmp_path / "own"))
        finding = named(versions.verdicts(found), "certificate")
        assert finding.level is level
        assert "can be written by other users (mode 666)" in finding.text


def test_a_certificate_on_trial_is_a_warning(tmp_path: Path) -> None:
    unknown = known("0.5.99", send_kv_chunk=CHANGED)
    certificates.write(certificates.for_known(unknown, [DISAGGREGATION], trial=True), tmp_path / "own")
    found = certificates.certified(unknown, Settings(certificates=tmp_path / "own"))
    finding = named(versions.verdicts(found), "certificate")
    assert finding.level is Level.WARNING
    assert finding.text.endswith(", on trial: only for servers of certify")


def test_a_function_that_upstream_has_by_now_is_not_added() -> None:
    (added, *_) = (patch for patch in PATCHES if patch.adds)
    findings = verdicts(IN_VENV, isend_tensor_dict=CHANGED)
    assert findings[0].level is Level.WRONG
    finding = named(findings, added.target.partition(":")[2])
    assert finding.text == f"{added.target} differs from SGLang {IN_VENV}"


def test_without_sglang_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ContractError, match=r"^SGLang is not installed for this Python"):
        installed.folder()
    (finding,) = versions.check_patches(Settings())
    assert finding.level is Level.WRONG


def test_what_is_read_from_files_is_what_the_process_has() -> None:
    """The plugin asks SGLang itself; both must speak of the same release."""
    import sglang

    assert sglang.__file__
    assert installed.folder() == Path(sglang.__file__).parent
    assert installed.release() == sglang_release()
