"""The published command lines, scaled down: every option is there but for those that are listed here."""

from __future__ import annotations

import pytest

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


def test_few_servers_show_all_lines() -> None:
    assert len({line.scaled(2) for line in PUBLISHED}) == 6
