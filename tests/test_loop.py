"""The parts of the suite leave no test out and run none twice, and a server needs its marker."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from rig.server import Server, ServerError
from scripts import suite

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "sglang_npu_pp/tools/certify/model"
WHOLE = ("test", "test-rest", "test-release")
MARKERS = ("server", "simulator", "slow", "thorough", "release")


def selected(expression: str, items: list[pytest.Item]) -> set[str]:
    """As `pytest -m` selects; its expressions are expressions of Python as well."""
    return {
        item.nodeid
        for item in items
        if eval(expression, {}, {name: item.get_closest_marker(name) is not None for name in MARKERS})
    }


def expressions(part: str) -> list[str]:
    """What each run of the part selects by markers."""
    return [run[run.index("-m") + 1] for run in suite.PARTS[part]]


def test_every_test_is_in_one_run_of_one_part(collected: list[pytest.Item]) -> None:
    everything = {item.nodeid for item in collected}
    runs = [selected(expression, collected) for part in WHOLE for expression in expressions(part)]
    assert len(everything) == len(collected)
    assert set.union(*runs) == everything
    assert sum(map(len, runs)) == len(everything)


def test_the_usual_part_begins_with_the_quick_one(collected: list[pytest.Item]) -> None:
    (quick,) = suite.PARTS["quick"]
    assert suite.PARTS["test"][0] == quick
    assert not selected(expressions("quick")[0], collected) & selected("server or simulator", collected)


def test_pytest_selects_what_is_computed_here(
    request: pytest.FixtureRequest, collected: list[pytest.Item]
) -> None:
    """Else markers would be set too late to select by. Only of a run that nothing but markers restricts."""
    options = request.config.option
    if options.keyword or options.deselect or getattr(options, "lf", False):
        pytest.skip("this run is restricted by more than markers")
    expression = options.markexpr or "True"
    assert {item.nodeid for item in request.session.items} == selected(expression, collected)


def test_the_makefile_and_ci_run_each_part_once() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert sorted(re.findall(r"-m scripts\.suite (\S+) \$\(ARGS\)$", makefile, re.MULTILINE)) == sorted(
        suite.PARTS
    )
    assert re.search(r"^test-all: test test-rest test-release ", makefile, re.MULTILINE)
    assert re.findall(r"^make ([a-z-]+)", (ROOT / ".ci/run").read_text(), re.MULTILINE) == [
        "test",
        "test-rest",
    ]


def run_part(part: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scripts.suite", part, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("def test_light(): pass", 0),
        ("def test_light(): assert False", 1),
        ("import pytest\n@pytest.mark.server\ndef test_heavy(): pass", 0),
        ("import pytest\n@pytest.mark.server\ndef test_heavy(): assert False", 1),
        ("def test_light(): assert False\nimport pytest\n@pytest.mark.server\ndef test_heavy(): pass", 1),
        ("", 5),
    ],
)
def test_the_status_of_a_part_is_that_of_its_runs(tmp_path: Path, code: str, status: int) -> None:
    (tmp_path / "test_some.py").write_text(code)
    options = ("-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-c", str(ROOT / "pyproject.toml"))
    done = run_part("test", *options, str(tmp_path))
    assert done.returncode == status, done.stdout + done.stderr


def test_an_unknown_part_is_refused() -> None:
    done = run_part("tset")
    assert done.returncode == 2
    assert "PART is one of quick, test, test-rest, test-release" in done.stderr


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
