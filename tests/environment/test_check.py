"""Environments are what their locks say, and what is not is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.environment import check
from scripts.environment.parts import LOCKS, ROOT, parts

from .wheels import make_installed

pytestmark = pytest.mark.slow

LOCK = (
    "alpha==1.0 \\\n    --hash=sha256:00\n    # via beta\nbeta==2.0\ngamma==3.0 ; sys_platform == 'win32'\n"
)


@pytest.mark.slow
def test_venv_and_the_parts_beside_it_are_what_their_locks_say() -> None:
    command = [sys.executable, "-m", "scripts.environment.check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "as the lock says\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ({"alpha": "1.0", "beta": "2.0"}, None),
        ({"alpha": "1.0", "Beta": "2.0", "sglang_npu_pp": "0.1.0"}, None),
        ({"alpha": "1.0", "beta": "2.0", "delta": "4.0"}, "delta 4.0 is in .* but not in lock.txt"),
        ({"alpha": "1.0"}, "beta 2.0 is in lock.txt but not in "),
        ({"alpha": "1.0", "beta": "2.1"}, "beta is 2.1 in .* and 2.0 in lock.txt"),
    ],
    ids=["as locked", "spelled otherwise, and ours", "one more", "one less", "another version"],
)
def test_a_package_that_is_not_as_locked_is_named(
    tmp_path: Path, there: dict[str, str], sentence: str | None
) -> None:
    lock, site = tmp_path / "lock.txt", tmp_path / "site"
    lock.write_text(LOCK)
    for name, version in there.items():
        make_installed(site, name, version)
    found = list(check.against_lock(site, lock))
    assert len(found) == (sentence is not None)
    if sentence:
        (text,) = found
        with pytest.raises(AssertionError, match=sentence):
            raise AssertionError(text)


def test_a_package_of_this_environment_that_the_lock_lacks_is_named(tmp_path: Path) -> None:
    """The lock of .venv without one line, held against the real .venv."""
    lock = tmp_path / "venv.txt"
    site = Path(pytest.__file__).parents[1]
    assert list(check.against_lock(site, LOCKS / "venv.txt")) == []
    lines = (LOCKS / "venv.txt").read_text().splitlines(keepends=True)
    lock.write_text("".join(line for line in lines if not line.startswith("filelock==")))
    (sentence,) = check.against_lock(site, lock)
    assert sentence.startswith("filelock 3.")


@pytest.mark.parametrize(
    ("requirement", "sentence"),
    [
        ("numpy<1", "pip check: planted 1.0 has requirement numpy<1, but you have numpy "),
        ("no-such-package", "pip check: planted 1.0 requires no-such-package, which is not installed."),
    ],
    ids=["a conflict", "a missing package"],
)
def test_what_pip_check_finds_is_red(tmp_path: Path, requirement: str, sentence: str) -> None:
    make_installed(tmp_path, "planted", "1.0", [requirement])
    (found,) = check.unexpected(check.pip_check(tmp_path), check.left_out("venv"), ())
    assert found.startswith(sentence)


def test_what_is_left_out_is_missing_by_name(tmp_path: Path) -> None:
    """The kernels for CUDA that SGLang asks for: silenced because they are named, not because SGLang asks."""
    silenced = check.left_out("venv")
    said = check.pip_check()
    assert any("sglang-kernel" in line for line in said)
    assert list(check.unexpected(said, silenced, ())) == []
    others = [name for name in silenced if name != "sglang-kernel"]
    (sentence,) = check.unexpected(said, others, ())
    assert "requires sglang-kernel, which is not installed" in sentence


def test_a_conflict_is_intended_for_the_release_that_is_named_only() -> None:
    line = "sglang 0.5.23 has requirement torch==2.14.1, but you have torch 2.13.0+cpu."
    other = "modelscope 1.0 has requirement torch==2.14.1, but you have torch 2.13.0+cpu."
    conflicts = check.conflicts()
    assert set(conflicts) <= set(parts())
    assert list(check.unexpected([line, other], (), conflicts["sglang-0.5.23"])) == [f"pip check: {other}"]
    assert list(check.unexpected([line], (), conflicts["sglang-0.5.20"])) == [f"pip check: {line}"]


def test_the_command_says_what_is_wrong_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "complaints", lambda: iter(["alpha is 1.0 in here and 2.0 in venv.txt"]))
    assert check.main() == 1
    first, advice = capsys.readouterr().out.splitlines()
    assert first == "alpha is 1.0 in here and 2.0 in venv.txt"
    assert advice.endswith("rm -r .venv/setup.stamp .venv/beside; make setup")
