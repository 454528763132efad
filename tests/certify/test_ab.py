"""Which servers `certify --ab` measures, and its table."""

from __future__ import annotations

from dataclasses import fields

from sglang_npu_pp.settings import Settings, load_settings
from sglang_npu_pp.tools.certify.ab import ALL_ON, COLUMNS, SWITCHES, rows, turns, variants
from sglang_npu_pp.tools.certify.results import Latency, Side, Speed


def speed(number: int, tokens: float, times_ms: float = 10.0) -> Speed:
    latency = Latency(mean=times_ms, median=times_ms, p99=2 * times_ms)
    return Speed(Side.PATCHED, number, 32, tokens / 16, tokens, 2 * tokens, latency, latency, latency)


def test_each_switch_is_off_in_one_server_and_all_are_set_in_every_one() -> None:
    defaults = Settings()
    found = {variant.name: load_settings(variant.environment) for variant in variants()}
    assert found[ALL_ON] == defaults
    changed = [
        [
            field.name
            for field in fields(Settings)
            if getattr(each, field.name) != getattr(defaults, field.name)
        ]
        for name, each in found.items()
        if name != ALL_ON
    ]
    assert changed == [[switch] for switch in SWITCHES]
    assert {len(variant.environment) for variant in variants()} == {len(SWITCHES)}


def test_the_order_turns_round_in_every_other_round() -> None:
    names = [variant.name for variant in variants()]
    assert [(number, variant.name) for number, variant in turns(3)] == [
        *((1, name) for name in names),
        *((2, name) for name in reversed(names)),
        *((3, name) for name in names),
    ]


def test_a_row_has_the_ratios_of_equal_rounds() -> None:
    """The second round was half as fast for both, which is no difference of the switch."""
    table = rows(
        {
            ALL_ON: [speed(1, 100), speed(2, 50), speed(3, 100)],
            "B=0": [speed(2, 45, times_ms=11), speed(1, 110, times_ms=8), speed(3, 100)],
            "C=0": [speed(1, 80)],
            "D=0": [speed(4, 80)],
        }
    )
    rate, time = "1.00 (0.90-1.10)", "1.00 (0.80-1.10)"
    assert table == [
        ("B=0", rate, rate, time, time, time),
        ("C=0", "0.80", "0.80", "1.00", "1.00", "1.00"),
        ("D=0", "-", "-", "-", "-", "-"),
    ]
    assert {len(row) for row in table} == {len(COLUMNS)}


def test_a_server_that_measured_nothing_gives_no_ratio() -> None:
    assert rows({ALL_ON: [speed(1, 0, times_ms=0)], "B=0": [speed(1, 80)]}) == [
        ("B=0", "-", "-", "-", "-", "-")
    ]
