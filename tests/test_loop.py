"""The selections of the Makefile leave no test out and run none twice, and a server needs its marker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rig.server import Server, ServerError

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "sglang_npu_pp/tools/certify/model"
SELECTIONS = dict(
    re.findall(r"^(QUICK|TEST|REST|RELEASE) := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
)
MARKERS = ("server", "simulator", "thorough", "release")


def selected(expression: str, items: list[pytest.Item]) -> set[str]:
    """As `pytest -m` selects; its expressions are expressions of Python as well."""
    return {
        item.nodeid
        for item in items
        if eval(expression, {}, {name: item.get_closest_marker(name) is not None for name in MARKERS})
    }


def test_every_test_is_in_one_of_three_selections(collected: list[pytest.Item]) -> None:
    everything = {item.nodeid for item in collected}
    parts = [selected(SELECTIONS[name], collected) for name in ("TEST", "REST", "RELEASE")]
    assert len(everything) == len(collected)
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)


def test_the_quick_selection_is_part_of_the_usual_one(collected: list[pytest.Item]) -> None:
    quick = selected(SELECTIONS["QUICK"], collected)
    assert quick <= selected(SELECTIONS["TEST"], collected)
    assert not quick & selected("server or simulator", collected)


def test_pytest_selects_what_is_computed_here(
    request: pytest.FixtureRequest, collected: list[pytest.Item]
) -> None:
    """Else markers would be set too late to select by. Only of a run that nothing but markers restricts."""
    options = request.config.option
    if options.keyword or options.deselect or getattr(options, "lf", False):
        pytest.skip("this run is restricted by more than markers")
    expression = options.markexpr or "True"
    assert {item.nodeid for item in request.session.items} == selected(expression, collected)


def test_the_makefile_and_ci_run_these_selections_once() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in SELECTIONS:
        assert len(re.findall(rf'-m pytest (?:-n 2 --dist loadscope )?-m "\$\({name}\)"', makefile)) == 1
    assert re.search(r"^test-all: test test-rest test-release ", makefile, re.MULTILINE)
    assert re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE) == [
        "test",
        "test-rest",
    ]


def test_a_server_is_refused_in_a_test_without_the_marker(tmp_path: Path) -> None:
    server = Server(MODEL, 1, 1, log=tmp_path / "log")
    with pytest.raises(ServerError, match="needs the marker `server`"):
        server.start()
    assert not list(tmp_path.iterdir())


def test_a_server_is_refused_in_a_child_of_such_a_test(tmp_path: Path) -> None:
    """As tests that run a script would start one."""
    program = f"""
from pathlib import Path
from rig.server import Server
Server(Path({str(MODEL)!r}), 1, 1, log=Path({str(tmp_path / "log")!r})).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "needs the marker `server`" in done.stderr


@pytest.mark.parametrize(("length", "status"), [(72, 0), (73, 1)])
def test_a_commit_subject_has_a_limit(tmp_path: Path, length: int, status: int) -> None:
    """In characters; the body may be as long as it likes."""
    message = tmp_path / "message"
    message.write_text("\N{LATIN SMALL LETTER E WITH ACUTE}" * length + "\n\n" + "body " * 40)
    command = [ROOT / "scripts/commit_subject.sh", message]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert ("73 characters" in done.stderr) == bool(status)
