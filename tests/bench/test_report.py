"""What a run says, from hand-made runs: ratios by pairs, delays, and whether tokens were equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from scripts.bench import report
from scripts.bench.competitors import OURS, UPSTREAM, Competitor, Idle, Run
from scripts.bench.counters import Counted
from scripts.bench.load import DECODE, Answers
from scripts.bench.measure import Measurements
from scripts.bench.plan import NO_DELAY, Group, LinkSetting, Work

FIRST, SECOND = Competitor(UPSTREAM), Competitor(OURS)
WORK = Work("decode", 20)
DELAYED = LinkSetting(5)


def run(duration_s: float, token: int = 1) -> Run:
    """66 forwards of which the slower stage computes 10 ms; the scheduler of the busier one takes 2 ms."""
    stages = (
        Counted(launches=66, forward_s=66 * 0.020, compute_s=66 * 0.010, host_cpu_s=66 * 0.001),
        Counted(launches=66, forward_s=66 * 0.020, compute_s=66 * 0.007, host_cpu_s=66 * 0.002),
    )
    return Run(Answers(duration_s, 0.5, 0.02, ((token,) * 33,) * 32), stages, load_average=1.5)


@pytest.fixture
def found() -> Measurements:
    made = Measurements(Group(2, (FIRST, SECOND), (WORK,)))
    made.runs = {
        (WORK, NO_DELAY): {FIRST: [run(3.0), run(6.0), run(3.0)], SECOND: [run(2.0), run(2.0), run(2.5)]},
        (WORK, DELAYED): {FIRST: [run(9.0)] * 3, SECOND: [run(2.0 + 66 * 0.0055)] * 3},
    }
    for competitor in (FIRST, SECOND):
        made.answers[competitor] = [((4, 5),), ((4, 5),)]
        made.idle[competitor] = [Idle(0.01, (0.02, 0.03)), Idle(0.01, (0.01,))]
        made.memory_mib[competitor] = 100.0
    return made


def row_of(found: Measurements, competitor: Competitor, link: LinkSetting) -> report.Row:
    (row,) = [
        row
        for row in report.rows(found)
        if row.competitor == competitor.design and row.delay_ms == link.delay_ms
    ]
    return row


def test_ratios_are_of_pairs_and_their_median_counts(found: Measurements) -> None:
    row = row_of(found, SECOND, NO_DELAY)
    # Pairs 3/2, 6/2, 3/2.5; the ratio of medians would be the same, that of means would not.
    assert (row.ratio_median, row.ratio_min, row.ratio_max, row.n) == (1.5, 1.2, 3.0, 3)
    assert row_of(found, FIRST, NO_DELAY).ratio_median == 1.0


def test_what_a_delay_costs_is_told_against_the_same_server_without_it(found: Measurements) -> None:
    row = row_of(found, SECOND, DELAYED)
    assert row.delays_per_iteration == pytest.approx(1.1)
    assert row.exposed == pytest.approx(66 * 0.0055 / (2 + 66 * 0.0055))
    assert row.kept == pytest.approx(2 / (2 + 66 * 0.0055))
    assert row.delays_per_token == 0.0
    assert row_of(found, SECOND, NO_DELAY).delays_per_iteration is None


def test_a_server_whose_stages_are_not_counted_has_ratios_only(found: Measurements) -> None:
    uncounted = Run(Answers(1.5, 0.5, 0.02, ()), (), load_average=1.0)
    found.runs[WORK, DELAYED][SECOND] = [uncounted] * 3
    row = row_of(found, SECOND, DELAYED)
    assert row.ratio_median == 6.0
    assert row.kept == pytest.approx(2 / 1.5)
    assert row.iteration_ms is None
    assert row.host_cpu_ms is None
    assert row.shortest_ms is None


def test_times_are_of_the_stage_that_has_most(found: Measurements) -> None:
    row = row_of(found, SECOND, NO_DELAY)
    assert row.compute_ms == pytest.approx(10)
    assert row.host_cpu_ms == pytest.approx(2)
    assert row.tokens_per_s == pytest.approx(DECODE.answer_tokens / 2.0)


@pytest.mark.parametrize(
    ("depth", "link", "shortest_ms"),
    [
        (0, NO_DELAY, 20 + 2),  # the busier stage's forward and host
        (0, DELAYED, (2 * 20 + 2 * 5) / 2),  # a round of two microbatches
        (1, DELAYED, 20 + 2),  # a round of three would be shorter
    ],
)
def test_an_iteration_is_no_shorter_than_its_parts(
    found: Measurements, depth: int, link: LinkSetting, shortest_ms: float
) -> None:
    deeper = replace(SECOND, depth=depth)
    found.group = Group(2, (FIRST, deeper), (WORK,))
    found.answers[deeper] = found.answers[SECOND]
    found.runs = {(WORK, link): {FIRST: [run(9.0)], deeper: [run(3.0)]}}
    assert row_of(found, deeper, link).shortest_ms == pytest.approx(shortest_ms)


def test_drafts_are_compared_with_the_same_server_without_by_pairs(found: Measurements) -> None:
    """Not with the other design, nor with the median of all."""
    upstream, ours = (replace(each, drafts=True) for each in (FIRST, SECOND))
    found.group = Group(2, (upstream, ours, ours.without_drafts), (WORK,))
    found.answers = {each: [((4, 5),)] for each in found.group.competitors}
    of_ours, without = [run(2.0), run(1.0), run(2.0)], [run(3.0), run(4.0), run(8.0)]
    found.runs = {(WORK, NO_DELAY): {upstream: [run(6.0)] * 3, ours: of_ours, ours.without_drafts: without}}
    by_drafts = {(row.competitor, row.drafts): row.by_drafts for row in report.rows(found)}
    assert by_drafts == {(UPSTREAM, True): None, (OURS, True): (4.0, 1.5, 4.0), (OURS, False): None}


def test_one_other_token_in_one_repetition_is_told(found: Measurements) -> None:
    assert row_of(found, SECOND, NO_DELAY).tokens_equal
    found.runs[WORK, NO_DELAY][SECOND][1] = run(2.0, token=2)
    assert not row_of(found, SECOND, NO_DELAY).tokens_equal
    assert row_of(found, SECOND, DELAYED).tokens_equal


def test_another_answer_to_the_check_is_told_in_every_cell(found: Measurements) -> None:
    found.answers[SECOND][1] = ((4, 6),)
    assert not row_of(found, SECOND, DELAYED).tokens_equal
    assert row_of(found, FIRST, DELAYED).tokens_equal


def test_the_table_marks_other_tokens(found: Measurements) -> None:
    found.answers[SECOND][1] = ((4, 6),)
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(console, [found])
    assert "OTHER TOKENS" in console.export_text()


def test_the_file_holds_a_row_a_cell_and_the_conditions(found: Measurements, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    about = report.conditions("loopback", ["bench"], "model")
    report.write_json(path, [found], about, 12.3)
    assert report.read_rows(path) == report.rows(found)
    written = json.loads(path.read_text())
    assert {"versions", "flags", "command", "commit", "link"} <= set(written["conditions"])
    wanted = (
        "load pad_ms delay_ms rate_mbit pp depth competitor ratio_median ratio_min ratio_max n tokens_equal"
    )
    assert set(wanted.split()) <= set(written["rows"][0])
    assert written["servers"][1]["idle_cpu_cores"] == 0.01
    assert written["servers"][1]["idle_first_token_ms"] == 20
