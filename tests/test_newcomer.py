"""The README's commands, one after the other and in another order, in one clone that has nothing yet."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_documents import ROOT, commands

pytestmark = [pytest.mark.server, pytest.mark.timeout(1800)]

LIMIT_S = 900
PART_OF_THE_SUITE = "make test ARGS=tests/test_settings.py"  # behind lint, as all of it would be

# The model cannot be fetched here: the demo starts the same server with one of this repository, and ends it.
DEMO = "make demo"

RUN_AS = {
    "pip install --no-deps .": "{python} -m pip install --no-deps .",
    "python -m sglang_npu_pp doctor": "{python} -m sglang_npu_pp doctor",
    "python -m sglang.launch_server --model-path Qwen/Qwen3-VL-8B-Instruct --tp-size 2 --pp-size 2": DEMO,
    "make serve": DEMO,
    "make test": PART_OF_THE_SUITE,
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git has or would have of this clone, and nothing that was made in it."""
    folder = tmp_path_factory.mktemp("newcomer") / "clone"
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):  # it may have been removed, and git not been told
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def run(clone: Path, command: str) -> str:
    """In a shell of a newcomer, without what the test run has set."""
    ours = ("MAKE", "MFLAGS", "PYTEST", "PYTHONPATH", "VIRTUAL_ENV", "REQUIRE_ASCEND_SIM")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_readmes_commands_are_those_that_are_run_here() -> None:
    assert set(commands(ROOT / "README.md")) == set(RUN_AS)


@pytest.mark.release
def test_the_readmes_commands_in_any_order(clone: Path) -> None:
    """Installing leaves files in the clone, which neither lint nor an import may take for ours."""
    own = clone.parent / "own"
    run(clone, f"{sys.executable} -m venv {own} && {own}/bin/python -m pip install --no-deps .")
    assert (clone / "build").is_dir(), (
        "what it leaves is somewhere else now: see whether this test is still needed"
    )
    assert "skipped" not in run(clone, PART_OF_THE_SUITE)
    for command in dict.fromkeys(RUN_AS.values()):
        run(clone, command.format(python=".venv/bin/python"))


@pytest.mark.release
def test_set_up_again_costs_nothing_and_links_to_the_clone(clone: Path) -> None:
    assert run(clone, "make setup") == ""
    where = run(clone, ".venv/bin/python -c 'import sglang_npu_pp; print(sglang_npu_pp.__file__)'")
    assert where == f"{clone / 'sglang_npu_pp' / '__init__.py'}\n"
