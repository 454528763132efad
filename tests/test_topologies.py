"""The table of topologies: docs/topologies.md is what the command prints, and its tests exist."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sglang_npu_pp.__main__ import main
from sglang_npu_pp.text import WIDTH
from sglang_npu_pp.tools.topologies import CPU, NOT_RUN, ROWS, SIMULATED, Here, Row, Shown

ROOT = Path(__file__).parents[1]
WRITTEN = (ROOT / "docs/topologies.md").read_text()
TABLE = [line for line in WRITTEN.splitlines() if line.startswith("| ")][1:]
SHOWN = sorted({shown for row in ROWS for shown in row.shown}, key=lambda shown: shown.test)
ON_SIMULATED_ASCEND = {
    "test_ascend.py",
    "test_prefill_dspark.py",
    "test_published_lines.py",
    "test_sparse_attention.py",
    "test_staging_buffer.py",
}


def test_the_document_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topologies", "--markdown"]) == 0
    assert capsys.readouterr().out == WRITTEN, (
        "write it again: python -m sglang_npu_pp topologies --markdown > docs/topologies.md"
    )


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.test)
def test_a_test_that_is_named_exists_and_runs_on_that_device(shown: Shown) -> None:
    path, _, name = shown.test.partition("::")
    names = [node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")]
    assert name in names
    simulated = path.startswith("tests/ascend/") or Path(path).name in ON_SIMULATED_ASCEND
    assert shown.device == (SIMULATED if simulated else CPU)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_a_row_without_a_test_says_that_it_was_not_run(row: Row) -> None:
    (line,) = (line for line in TABLE if line.startswith(f"| {row.feature} |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3] == row.here.value
    assert (cells[4] == NOT_RUN) == (row.here is Here.IN_FORCE and not row.shown)
    assert cells[5] or row.here is Here.REFUSED, "say why it was not run"


def test_the_table_fits_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["topologies"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["here", "shown", "on", "feature"]
    assert len(lines) > len(ROWS)
    assert max(map(len, lines)) <= WIDTH
