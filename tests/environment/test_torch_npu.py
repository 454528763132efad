"""Another torch_npu: both packages apart from each other, and a sentence where one is not to be had."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ascend_sim import build
from scripts.environment import installer, torch_npu

from .wheels import make_wheel


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of the package index, which lacks torch."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(torch_npu, "BESIDE", tmp_path / "beside")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    make_wheel(tmp_path / "index", "torch_npu", "99.1.0.post7")
    return tmp_path / "index"


def test_each_gets_a_folder_of_its_own(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else torch loads torch_npu by itself, and wants an Ascend machine."""
    make_wheel(index, "torch", "99.1.0+cpu")
    made = torch_npu.environment("99.1.0.post7")
    assert [path.name for path in Path(made["PYTHONPATH"]).glob("torch*.py")] == ["torch.py"]
    assert [path.name for path in Path(made[torch_npu.CHOSEN]).glob("torch*.py")] == ["torch_npu.py"]
    monkeypatch.setenv("PYTHONPATH", "/mine")
    index.rename(tmp_path / "gone")
    again = torch_npu.environment("99.1.0.post7")
    assert again["PYTHONPATH"].split(os.pathsep) == [made["PYTHONPATH"], "/mine"], "and not installed again"


def test_a_torch_that_is_not_to_be_had_is_a_sentence(index: Path, tmp_path: Path) -> None:
    with pytest.raises(installer.InstallerError, match=r"^torch==99\.1\.0\+cpu could not be installed \("):
        torch_npu.environment("99.1.0.post7")
    assert not list((tmp_path / "beside").iterdir())


def test_the_simulator_uses_the_one_that_was_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert torch_npu.CHOSEN == build.CHOSEN
    monkeypatch.setenv(build.CHOSEN, str(tmp_path))
    assert build.torch_npu() == tmp_path / "torch_npu"
