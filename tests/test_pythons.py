"""Pythons beside that of `.venv`: images for Ascend carry 3.11 and 3.12.

There is no CPU build of torch for another Python on this kind of machine: what uses a tensor, and servers,
ran with 3.11 only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rig.releases import IN_VENV, RELEASES
from scripts.environment import pythons

pytestmark = [pytest.mark.release, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sglang_npu_pp"
SITE = Path(sysconfig.get_path("purelib"))
CONTRACTS = json.loads((ROOT / "patches/contracts.json").read_text())
LIMIT_S = 600

# What certainly needs no tensor: tests of each have passed, however many others there are.
SUBJECTS = {
    *("test_addresses", "test_agreement", "test_builds", "test_fingerprints", "test_ledger", "test_lookups"),
    *("test_metrics", "test_outcomes", "test_settings", "test_timeline", "test_versions", "test_window"),
}
FEWEST = 700  # tests

COMPILE = (
    "import pathlib, sys; [compile(pathlib.Path(each).read_text(), each, 'exec') for each in sys.argv[1:]]"
)
FINGERPRINTS = (
    "import json, pathlib, sys, sglang_npu_pp.fingerprints as own; folder = pathlib.Path(sys.argv[1]); "
    "print(json.dumps({each: own.fingerprint_on_disk(each, folder) for each in json.load(sys.stdin)}))"
)


@pytest.fixture(scope="module", params=["3.12"])
def version(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def interpreter(version: str) -> Path:
    found = pythons.interpreter(version)
    if found is None:
        pytest.skip(
            f"this machine has no Python {version}, neither python{version} on PATH nor one of pyenv's"
        )
    return found


@pytest.fixture(scope="module")
def python(version: str, interpreter: Path) -> Path:
    """With all that the package needs, but torch and SGLang."""
    return pythons.environment(version, interpreter)


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """With the files of SGLang, with this package as it is installed in `.venv`, and with names of torch."""
    for found in (SITE / "sglang", *SITE.glob("sglang-*.dist-info"), *SITE.glob("sglang_npu_pp-*.dist-info")):
        (tmp_path / found.name).symlink_to(found)
    path = (ROOT / "tests/without_torch", tmp_path, ROOT)
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "SITE_OF_VENV": str(SITE)}


def run(*command: str | Path, environ: dict[str, str] | None = None, text: str = "") -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environ,
        input=text,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    return done.stdout


def test_every_module_compiles_without_a_warning(interpreter: Path) -> None:
    """Python 3.12 warns of escapes in texts that 3.11 takes."""
    modules = sorted({*PACKAGE.rglob("*.py"), *(ROOT / "patches").rglob("*.py")})
    assert len(modules) > 50
    run(interpreter, "-W", "error", "-c", COMPILE, *modules)


def test_types_are_right(version: str, interpreter: Path) -> None:
    run(sys.executable, "-m", "mypy", "--python-version", version, PACKAGE)


@pytest.mark.parametrize("release", [name for name in RELEASES if RELEASES[name].is_installed])
def test_fingerprints_are_those_of_the_contracts(release: str, python: Path, environ: dict[str, str]) -> None:
    """The contracts were written with 3.11: the same files give the same here."""
    folder = RELEASES[release].folder or SITE
    wanted = {
        target: None if found == "absent" else found
        for target, versions in CONTRACTS["functions"].items()
        for found, releases in versions.items()
        if release in releases
    }
    found = run(python, "-c", FINGERPRINTS, folder / "sglang", environ=environ, text=json.dumps([*wanted]))
    assert json.loads(found) == wanted
    assert len(wanted) > 80


def test_what_needs_no_tensor_passes(python: Path, environ: dict[str, str], tmp_path: Path) -> None:
    result = tmp_path / "result.xml"
    command = ["-m", "pytest", "-p", "tests.without_torch.plugin", "-p", "no:cacheprovider", "-q", "-n", "2"]
    selection = ["--dist", "loadscope", "-m", "not (server or simulator)", f"--junitxml={result}", "tests"]
    try:
        run(python, *command, *selection, environ=environ)
    finally:
        outcomes = of_tests(result) if result.exists() else {}
        print(f"{sum(outcomes.values(), Counter())} in {len(outcomes)} modules")
    passed = Counter({module: counted["passed"] for module, counted in outcomes.items()})
    assert set(+passed) >= SUBJECTS
    assert passed.total() >= FEWEST


def of_tests(result: Path) -> dict[str, Counter[str]]:
    """By the last name of a module, how its tests ended."""
    outcomes: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(result).iter("testcase"):
        names = re.findall(r"\btest_\w+", case.get("classname") or case.get("name") or "")
        ends = {child.tag for child in case} & {"skipped", "failure", "error"}
        outcomes.setdefault(names[0] if names else "", Counter())[ends.pop() if ends else "passed"] += 1
    return outcomes


def test_the_release_in_venv_is_the_one_of_these_tests() -> None:
    """Else `environ` has files of another SGLang than the tests expect."""
    (found,) = SITE.glob("sglang-*.dist-info")
    assert found.name == f"sglang-{IN_VENV}.dist-info"
