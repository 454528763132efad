"""The locks fit the short files that they are made from; `make lock`, with a real uv and its own packages."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts.environment import check, lock
from scripts.environment.parts import LOCKS, REQUIREMENTS, VENV, WITHOUT_TORCH, lock_names, part_names

from .wheels import make_wheel

NAMES = lock_names()
EACH = pytest.mark.parametrize("name", NAMES)
PINS = {name: lock.read(LOCKS / f"{name}.txt") for name in NAMES}
CUDA = re.compile(r"(nvidia|cuda|cupy|flashinfer|sgl|sglang)-.*")


def test_every_lock_has_a_short_file() -> None:
    assert {path.stem for path in LOCKS.glob("*.txt")} == set(NAMES)


@EACH
def test_what_is_wanted_is_locked(name: str) -> None:
    for wanted in lock.requirements((REQUIREMENTS / f"{name}.in").read_text()):
        (pin,) = PINS[name][canonicalize_name(wanted.name)].specifier
        assert wanted.specifier.contains(pin.version), f"{pin} is locked, {wanted} is wanted; make lock"


@EACH
def test_every_package_has_one_version_and_its_hashes(name: str) -> None:
    text = (LOCKS / f"{name}.txt").read_text()
    assert PINS[name]
    for package, pin in PINS[name].items():
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        hashed = re.search(rf"^{re.escape(str(pin.name))}==\S+ .*\\\n    --hash=sha256:", text, re.M)
        assert bool(hashed) == (package != lock.WITHOUT_HASH), pin


@EACH
def test_held_back_versions_are_held_back(name: str) -> None:
    for held in lock.requirements((REQUIREMENTS / lock.CONSTRAINTS).read_text()):
        if pin := PINS[name].get(canonicalize_name(held.name)):
            (specifier,) = pin.specifier
            assert held.specifier.contains(Version(specifier.version)), f"{held}, and {pin} is locked"


def test_every_version_that_is_held_back_says_why_and_until_when() -> None:
    lines = (REQUIREMENTS / lock.CONSTRAINTS).read_text().splitlines()
    for line in lines:
        if line and not line.startswith("#"):
            assert re.fullmatch(r"\S+ +# .+; until .+", line), line


@EACH
def test_nothing_that_is_left_out_is_locked(name: str) -> None:
    assert not set(check.left_out(name)) & set(PINS[name])
    assert [package for package in PINS[name] if CUDA.fullmatch(package)] == []


@EACH
@pytest.mark.parametrize("python", ["3.11", "3.12"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_lock_is_for_several_pythons_and_machines(name: str, python: str, machine: str) -> None:
    """All that is wanted is there; what else there is may differ."""
    there = lock.applicable(
        PINS[name],
        {"python_version": python, "python_full_version": f"{python}.1", "platform_machine": machine},
    )
    wanted = lock.requirements((REQUIREMENTS / f"{name}.in").read_text())
    assert {canonicalize_name(each.name) for each in wanted} <= set(there)


def test_a_part_repeats_only_what_it_wants_itself() -> None:
    """Its own SGLang, or a package that it needs beside other environments too; the rest is .venv's."""
    for name in part_names():
        wanted = lock.requirements((REQUIREMENTS / f"{name}.in").read_text())
        assert set(PINS[name]) & set(PINS[VENV]) <= {canonicalize_name(each.name) for each in wanted}


def test_other_pythons_get_the_versions_of_this_one() -> None:
    versions, here = lock.versions(PINS[WITHOUT_TORCH]), lock.versions(PINS[VENV])
    assert versions.items() <= here.items()
    assert "torch" not in versions


# --- make lock ---------------------------------------------------------------------------------------

Files = Mapping[str, str]


@pytest.fixture
def relock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mapping[str, Sequence[str]]]:
    """`lock_all` of short files of the test's own, with an index that is a folder."""
    index, source, target = tmp_path / "index", tmp_path / "requirements", tmp_path / "locks"
    source.mkdir()
    target.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    for name, version, requires in (
        ("alpha", "1.0", ["beta", "kernels-for-cuda"]),
        ("beta", "1.0", []),
        ("installer", "1.0", []),
        ("more", "1.0", ["beta", "only-more", "on-windows; sys_platform == 'win32'"]),
        ("only_more", "1.0", []),
        ("on_windows", "1.0", []),
    ):
        make_wheel(index, name, version, requires)
    files = {"venv.in": "alpha\n", "installer.in": "installer\n", "part.in": "more  # why\n"}
    files |= {"left_out.txt": "# gigabytes\nkernels-for-cuda\n", "constraints.txt": ""}

    def run(*options: str, **changed: str) -> Mapping[str, Sequence[str]]:
        for name, text in {**files, **changed}.items():
            (source / name).write_text(text)
        return lock.lock_all(source, target, options)

    return run


def test_a_lock_names_what_comes_with_what_is_wanted(
    relock: Callable[..., Mapping[str, Sequence[str]]], tmp_path: Path
) -> None:
    changed = relock()
    assert changed["venv"] == ["alpha 1.0 is new", "beta 1.0 is new"]
    assert changed["part"] == ["more 1.0 is new", "only-more 1.0 is new"], "beta is in .venv"
    text = (tmp_path / "locks" / "venv.txt").read_text()
    assert re.search(r"^beta==1.0 \\\n    --hash=sha256:\w{64}\n    # via alpha$", text, re.M)
    assert "kernels" not in text
    assert relock() == {"venv": [], "installer": [], "part": []}


@pytest.mark.slow
def test_versions_stay_until_an_upgrade_is_asked_for(
    relock: Callable[..., Mapping[str, Sequence[str]]], tmp_path: Path
) -> None:
    relock()
    make_wheel(tmp_path / "index", "beta", "2.0")
    assert relock()["venv"] == []
    would = lock.lock_all(tmp_path / "requirements", tmp_path, ["--upgrade"], tmp_path / "locks")
    assert would["venv"] == ["beta 1.0 -> 2.0"]
    assert relock()["venv"] == [], "asking what would change has changed nothing"
    assert relock("--upgrade", **{"constraints.txt": "beta<2\n"})["venv"] == []
    assert relock("--upgrade-package=beta")["venv"] == ["beta 1.0 -> 2.0"]


def test_another_python_gets_the_versions_of_venv(
    relock: Callable[..., Mapping[str, Sequence[str]]], tmp_path: Path
) -> None:
    relock()
    make_wheel(tmp_path / "index", "beta", "2.0")
    assert relock(**{"without_torch.in": "beta\n"})["without_torch"] == ["beta 1.0 is new"]


def test_what_is_wanted_no_more_goes_with_all_that_came_for_it(
    relock: Callable[..., Mapping[str, Sequence[str]]],
) -> None:
    relock()
    assert relock(**{"venv.in": "installer\n"})["venv"] == [
        "alpha 1.0 goes",
        "beta 1.0 goes",
        "installer 1.0 is new",
    ]


def test_what_cannot_be_resolved_is_said(relock: Callable[..., Mapping[str, Sequence[str]]]) -> None:
    with pytest.raises(lock.installer.InstallerError, match="no-such-package"):
        relock(**{"venv.in": "no-such-package\n"})


def test_hashes_of_torch_are_dropped_and_no_others() -> None:
    text = "# note\n" + "".join(
        f"{name}==1.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n    # via sglang\n"
        for name in ("torch", "torchvision")
    )
    first, second = lock.tidy(text)
    assert first == "torch==1.0\n    # via sglang\n"
    assert second == text.partition("sglang\n")[2]
    assert [str(pin) for pin in lock.requirements(text)] == ["torch==1.0", "torchvision==1.0"]
    assert lock.without_marker(Requirement("a==1 ; sys_platform == 'linux'")) == Requirement("a==1")
