"""Interpreters of other versions are found, and none that only seems to be one is taken."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from scripts.environment import pythons

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


def make_python(folder: Path, version: str, says: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / f"python{version}"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    return python


def test_an_interpreter_on_the_path_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = make_python(tmp_path / "bin", VERSION, f'exec "{sys.executable}" "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert pythons.interpreter(VERSION) == wanted


@pytest.mark.parametrize("says", ["echo pyenv: no such version >&2; exit 127", "echo 2.7"])
def test_a_shim_that_leads_nowhere_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    make_python(tmp_path / "bin", VERSION, says)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert pythons.interpreter(VERSION) is None
    of_pyenv = tmp_path / "pyenv/versions" / f"{VERSION}.1" / "bin"
    wanted = make_python(of_pyenv, VERSION, f'exec "{sys.executable}" "$@"')
    assert pythons.interpreter(VERSION) == wanted


def test_a_version_that_is_not_here_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    assert pythons.interpreter("3.99") is None
