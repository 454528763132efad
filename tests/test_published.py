"""The published command lines, scaled down: every option is there but for those that are listed here."""

from __future__ import annotations

import pytest

from scripts import topologies
from scripts.output import plain_console
from sglang_npu_pp.tools.published import PUBLISHED, Published

LEFT_OUT = {"--nnodes", "--quantization", "--moe-a2a-backend", "--deepep-mode"}
CHANGED = {
    "--tp-size": "2",
    "--attn-cp-size": "2",
    "--pp-size": "4",
    "--dtype": "float32",
    "--mem-fraction-static": "0.3",
}


def options(arguments: tuple[str, ...]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            found[option := argument] = []
        else:
            found[option].append(argument)
    return found


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: line.name)
def test_what_a_scaled_line_keeps(line: Published) -> None:
    before, after = options(line.for_0_5_21), options(line.scaled(4))
    assert set(before) - set(after) == LEFT_OUT
    assert set(after) <= set(before)
    chunk = {"--chunked-prefill-size": [str(line.chunk // 32)]}
    expected = {option: values for option, values in before.items() if option in after}
    assert after == {**expected, **{option: [value] for option, value in CHANGED.items()}, **chunk}


def test_lines_that_are_equal_here_share_a_server() -> None:
    groups = topologies.same_server(list(PUBLISHED), 2)
    assert [len(group) for group in groups] == [2, 1, 1, 1, 1, 4]
    assert sorted(line.name for group in groups for line in group) == sorted(line.name for line in PUBLISHED)


def test_the_table_has_every_line_and_its_verdict() -> None:
    console = plain_console(200)
    served = [
        topologies.Served(group, 2, ["something"] if number == 0 else [], 60.0)
        for number, group in enumerate(topologies.same_server(list(PUBLISHED), 2))
    ]
    with console.capture() as captured:
        console.print(topologies.table(served))
    rows = [line for line in captured.get().splitlines() if "glm" in line]
    assert [("WRONG" in row, "as a plain forward" in row) for row in rows] == [
        *[(True, False)] * 2,
        *[(False, True)] * 8,
    ]
    assert all(line.name in captured.get() for line in PUBLISHED)
