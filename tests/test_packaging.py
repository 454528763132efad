"""Wheel and source distribution: built, installed into a clean environment, complete."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import sglang_npu_pp

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NAME = f"sglang_npu_pp-{sglang_npu_pp.__version__}"
NOT_BUILT = ("__pycache__", "*.pyc", "*.egg-info")
LIMIT_S = 120


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(what: str, source: Path, target: Path) -> None:
    """With the setuptools of this environment: a build in isolation would fetch it from the network."""
    call = f"from setuptools import build_meta; build_meta.build_{what}({str(target)!r})"
    run(sys.executable, "-c", call, cwd=source)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("packaging")
    source, target = folder / "source", folder / "dist"
    source.mkdir()
    target.mkdir()
    for name in ("sglang_npu_pp", "patches", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*NOT_BUILT))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / name, source)
    build("sdist", source, target)
    with tarfile.open(target / f"{NAME}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    build("wheel", folder / NAME, target)
    return target


@pytest.fixture(scope="module")
def clean_python(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with the wheel and nothing else."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin/python"
    install = ("--python", python, "install", "--quiet", "--no-deps", "--no-index")
    run(sys.executable, "-m", "pip", *install, built / f"{NAME}-py3-none-any.whl", cwd=folder)
    return python


def ask(python: Path, program: str) -> str:
    """What a program prints that sees only that environment."""
    return run(python, "-I", "-c", program, cwd=python.parent)


def test_the_wheel_has_every_module(built: Path) -> None:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        packed = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        metadata = wheel.read(f"{NAME}.dist-info/METADATA").decode()
        licence = wheel.read(f"{NAME}.dist-info/licenses/LICENSE").decode()
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sglang_npu_pp").rglob("*.py")}
    modules |= {f"sglang_npu_pp/{path.relative_to(ROOT)}" for path in (ROOT / "patches").rglob("*.py")}
    model = {str(path.relative_to(ROOT)) for path in (ROOT / "sglang_npu_pp/tools/certify/model").iterdir()}
    assert packed == modules | model | {"sglang_npu_pp/py.typed", "sglang_npu_pp/patches/contracts.json"}
    assert "License-Expression: Apache-2.0" in metadata
    assert licence == (ROOT / "LICENSE").read_text()


def test_the_source_distribution_has_what_readers_need(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    documents = {str(path.relative_to(ROOT)) for path in (ROOT / "docs").iterdir()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml"} | documents <= names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]


def test_sglang_finds_the_plugin(clean_python: Path) -> None:
    """As sglang.srt.plugins looks for it."""
    program = """
from importlib.metadata import entry_points
(point,) = entry_points(group="sglang.srt.plugins")
print(point.name, point.dist.version, point.load().__module__)
"""
    expected = ["sglang_npu_pp", sglang_npu_pp.__version__, "sglang_npu_pp.plugin"]
    assert ask(clean_python, program).split() == expected


def test_the_patches_are_inside_with_their_contracts(clean_python: Path) -> None:
    program = """
from importlib import resources, util
package = resources.files("sglang_npu_pp").joinpath("patches")
print(package.joinpath("contracts.json").read_text())
assert util.find_spec("sglang_npu_pp.patches").origin == str(package.joinpath("__init__.py"))
"""
    assert json.loads(ask(clean_python, program)) == json.loads((ROOT / "patches/contracts.json").read_text())


def test_without_sglang_a_sentence_is_all_that_happens(clean_python: Path) -> None:
    done = subprocess.run(
        [clean_python, "-I", "-c", "import sglang_npu_pp; print(sglang_npu_pp.activate())"],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
    assert "sglang-npu-pp: not activated, SGLang is left as it is" in done.stderr


def test_the_version_is_written_once_and_the_changelog_has_it() -> None:
    """That the build finds it, without what the package imports, is shown by the names of what is built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    assert "version" not in project
    assert f"## {sglang_npu_pp.__version__}" in (ROOT / "CHANGELOG.md").read_text()
