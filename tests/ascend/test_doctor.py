"""What the doctor says of torch_npu: the real wheel, on the simulated CANN and without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ascend_sim import build
from ascend_sim.environment import environment
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.doctor import versions
from sglang_npu_pp.tools.doctor.findings import Finding, Level


@pytest.fixture
def with_torch_npu(monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process sees that torch_npu is installed; those that it starts can import it."""
    package = build.torch_npu()
    assert package is not None
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", str(package.parent), prepend=os.pathsep)
    return package.parent


def named(findings: list[Finding], subject: str) -> Finding:
    (finding,) = (finding for finding in findings if finding.subject == subject)
    return finding


def test_torch_npu_is_loaded_and_its_devices_are_counted(
    with_torch_npu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(devices=3).items():
        monkeypatch.setenv(name, value)
    findings = versions.check(dict(os.environ))
    finding = named(findings, "torch_npu")
    assert (finding.level, finding.text) == (Level.OK, f"{versions.version_of('torch_npu')}, 3 devices")
    assert named(findings, "CANN").level is Level.NOTE  # the simulated one does not say a version


def test_torch_npu_without_cann_is_wrong(with_torch_npu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    finding = versions._torch_npu()
    assert finding.level is Level.WRONG
    assert finding.text.startswith(f"{versions.version_of('torch_npu')} cannot be loaded (")
    assert ".so: cannot open shared object file" in finding.text
    assert "source CANN's set_env.sh" in finding.text


def test_patches_of_the_npu_count_where_torch_npu_is(with_torch_npu: Path) -> None:
    findings = versions.check_patches(Settings())
    assert named(findings, "AscendAttnBackend.init_forward_metadata").level is Level.OK
