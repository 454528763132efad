"""Where the time went: hand-made traces whose answer is known, then the picture and the command line."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_npu_pp.__main__ import main
from sglang_npu_pp.observe.trace import Event, RankTrace
from sglang_npu_pp.tools.timeline.states import (
    BACK_PRESSURE,
    BUBBLE,
    COMPUTE,
    EXPOSED,
    HOST,
    IDLE,
    Span,
    Timeline,
    _paint,
    analyse,
    table,
)

MS = 1_000_000  # ns
AHEAD_MS = 1000  # the clock of stage 1 is behind that of stage 0 by so much

Line = tuple[float, str, str, int]  # ms, name, kind, iteration


def trace(stage: int, lines: Sequence[Line], *, behind_ms: float = 0, end_ms: float = 100) -> RankTrace:
    """Events at these times of stage 0's clock, recorded by a clock that is behind it; two slots."""
    events = [
        Event(
            round((time - behind_ms) * MS), name, kind, -1 if kind == "requests" else iteration % 2, iteration
        )
        for time, name, kind, iteration in lines
    ]
    return RankTrace(stage, 0, round(behind_ms * MS), round((end_ms - behind_ms) * MS), events)


def states(timeline: Timeline, stage: int) -> list[tuple[float, float, str, str]]:
    """(begin and end in ms, state, message kind)."""
    spans = timeline.stages[stage].spans
    return [(s.begin_ns / MS, s.end_ns / MS, s.state, s.kind) for s in spans]


# Two microbatches. The proxies of the first are in hands 3 ms after they were pushed, and its tokens too.
FIRST = [
    (0.0, "iteration", "", 0),
    (0.5, "push", "requests", 0),
    (1.0, "launch", "", 0),
    (11.0, "launched", "", 0),
    (11.5, "push", "proxy", 0),
    (12.0, "iteration", "", 1),
    (12.5, "push", "requests", 1),
    (13.0, "launch", "", 1),
    (23.0, "launched", "", 1),
    (23.5, "push", "proxy", 1),
    (24.0, "wait", "output", 0),
    (29.0, "ready", "output", 0),
    (30.0, "iteration", "", 2),
    (30.5, "push", "requests", 2),
    (31.0, "wait", "output", 1),
    (40.0, "ready", "output", 1),
]
SECOND = [
    (0.0, "iteration", "", 0),
    (0.0, "wait", "requests", 0),
    (3.5, "ready", "requests", 0),
    (4.0, "wait", "proxy", 0),
    (14.5, "ready", "proxy", 0),
    (14.5, "launch", "", 0),
    (25.5, "launched", "", 0),
    (26.0, "push", "output", 0),
    (26.5, "iteration", "", 1),
    (26.5, "wait", "requests", 1),
    (26.6, "ready", "requests", 1),
    (26.7, "wait", "proxy", 1),
    (26.8, "ready", "proxy", 1),
    (27.0, "launch", "", 1),
    (37.0, "launched", "", 1),
    (37.5, "push", "output", 1),
]


def two_stages() -> list[RankTrace]:
    return [trace(0, FIRST), trace(1, SECOND, behind_ms=AHEAD_MS)]


def test_a_wait_is_a_bubble_until_its_message_was_pushed_and_exposed_from_then_on() -> None:
    timeline = analyse(two_stages())
    assert (timeline.begin_ns, timeline.end_ns) == (1 * MS, 37 * MS)  # first launch to the end of the last
    assert states(timeline, 0) == [
        (1, 11, COMPUTE, ""),
        (11, 13, HOST, ""),
        (13, 23, COMPUTE, ""),
        (23, 24, HOST, ""),
        (24, 26, BUBBLE, "output"),
        (26, 29, EXPOSED, "output"),
        (29, 31, HOST, ""),
        (31, 37, BUBBLE, "output"),
    ]
    assert states(timeline, 1) == [
        (1, 3.5, EXPOSED, "requests"),
        (3.5, 4, HOST, ""),
        (4, 11.5, BUBBLE, "proxy"),
        (11.5, 14.5, EXPOSED, "proxy"),
        (14.5, 25.5, COMPUTE, ""),
        (25.5, 26.5, HOST, ""),
        (26.5, 26.6, EXPOSED, "requests"),
        (26.6, 26.7, HOST, ""),
        (26.7, 26.8, EXPOSED, "proxy"),
        (26.8, 27, HOST, ""),
        (27, 37, COMPUTE, ""),
    ]


def test_times_and_shares_add_up() -> None:
    first, second = analyse(two_stages()).stages
    assert (first.launches, second.launches) == (2, 2)
    assert first.seconds(COMPUTE) == pytest.approx(0.020)
    assert first.seconds(EXPOSED, "output") == pytest.approx(0.003)
    assert first.share(BUBBLE) == pytest.approx(8 / 36)
    assert second.seconds(EXPOSED) == pytest.approx(0.0057)
    for stage in (first, second):
        assert sum(stage.share(s) for s in (COMPUTE, HOST, EXPOSED, BUBBLE, BACK_PRESSURE)) == pytest.approx(
            1
        )


def test_the_table_says_it_per_stage_and_kind() -> None:
    lines = {line[:22].strip(): line[22:].split() for line in table(analyse(two_stages())).splitlines()}
    assert lines["microbatches"] == ["2", "2"]
    assert lines["compute"] == ["10.000", "ms", "55.6", "%", "10.500", "ms", "58.3", "%"]
    assert lines["bubble ratio"] == ["4.000", "ms", "22.2", "%", "3.750", "ms", "20.8", "%"]
    assert lines["exposed communication"] == ["1.500", "ms", "8.3", "%", "2.850", "ms", "15.8", "%"]
    assert lines["requests"] == ["0.000", "ms", "0.0", "%", "1.300", "ms", "7.2", "%"]
    assert lines["proxy"] == ["0.000", "ms", "0.0", "%", "1.550", "ms", "8.6", "%"]
    assert lines["output"] == ["1.500", "ms", "8.3", "%", "0.000", "ms", "0.0", "%"]


def test_time_in_which_no_stage_has_anything_to_run_is_idle_and_not_counted() -> None:
    """Both stages go through iterations without a batch between two forwards."""
    first = trace(
        0,
        [
            (0, "iteration", "", 0),
            (0, "launch", "", 0),
            (10, "launched", "", 0),
            (10, "iteration", "", 1),
            (40, "iteration", "", 2),
            (40, "push", "requests", 2),
            (45, "launch", "", 2),
            (50, "launched", "", 2),
        ],
    )
    second = trace(
        1,
        [
            (0, "iteration", "", 0),
            (0, "launch", "", 0),
            (20, "launched", "", 0),
            (20, "iteration", "", 1),
            (30, "iteration", "", 2),
            (30, "wait", "requests", 2),
            (43, "ready", "requests", 2),
            (46, "launch", "", 2),
            (50, "launched", "", 2),
        ],
    )
    timeline = analyse([first, second])
    assert states(timeline, 0) == [
        (0, 10, COMPUTE, ""),
        (10, 20, BUBBLE, ""),
        (20, 40, IDLE, ""),
        (40, 45, HOST, ""),
        (45, 50, COMPUTE, ""),
    ]
    assert [span[:3] for span in states(timeline, 1)][1:4] == [
        (20, 40, IDLE),
        (40, 43, EXPOSED),
        (43, 46, HOST),
    ]
    assert timeline.stages[0].share(BUBBLE) == pytest.approx(10 / 30)


def test_requests_of_an_iteration_that_launches_nothing_keep_nobody_waiting() -> None:
    first = trace(0, [*FIRST[:5], (12, "iteration", "", 1), (13, "push", "requests", 1), *FIRST[10:12]])
    second = [*SECOND[:9], (26.5, "wait", "requests", 1), (28, "ready", "requests", 1)]
    ends = [(30.0, "launch", "", 4), (31.0, "launched", "", 4)]
    timeline = analyse([first, trace(1, [*second, *ends], behind_ms=AHEAD_MS)])
    assert (26.5, 28, BUBBLE, "requests") in states(timeline, 1)


def test_a_sender_that_is_held_up_shows_back_pressure() -> None:
    lines = [
        (0.0, "launch", "", 0),
        (4.0, "launched", "", 0),
        (5.0, "full", "proxy", 0),
        (8.0, "push", "proxy", 0),
        (8.5, "full", "proxy", 0),  # and the slots of the device lane, too
        (9.5, "post_send", "proxy", 0),
        (10.0, "launch", "", 1),
        (11.0, "launched", "", 1),
    ]
    timeline = analyse([trace(0, lines)])
    held = [span[:2] for span in states(timeline, 0) if span[2:] == (BACK_PRESSURE, "proxy")]
    assert held == [(5, 8), (8.5, 9.5)]


def test_on_a_device_the_forward_is_what_counts_and_waits_beneath_it_are_hidden() -> None:
    lines = [
        (0.0, "iteration", "", 0),
        (1.0, "launch", "", 0),
        (2.0, "launched", "", 0),
        (2.0, "wait", "output", 9),
        (12.0, "ready", "output", 9),
        (14.0, "iteration", "", 1),
        (14.0, "launch", "", 1),
        (15.0, "launched", "", 1),
        (4.0, "run", "", 0),  # its tensors came 3 ms behind the launch
        (10.0, "ran", "", 0),
        (14.0, "run", "", 1),
        (20.0, "ran", "", 1),
    ]
    last = trace(2, [(0, "iteration", "", 0), (7, "push", "output", 9), (21, "iteration", "", 1)])
    timeline = analyse([trace(0, lines), trace(1, lines), last])
    assert states(timeline, 0)[:2] == [(1, 2, HOST, ""), (2, 4, BUBBLE, "output")]  # it gets no proxies
    assert states(timeline, 1) == [
        (1, 4, EXPOSED, "proxy"),
        (4, 10, COMPUTE, ""),
        (10, 12, EXPOSED, "output"),
        (12, 14, HOST, ""),
        (14, 20, COMPUTE, ""),
    ]


def test_outputs_that_go_round_a_ring_are_pushed_by_the_stage_before() -> None:
    """As upstream sends them: the last stage waits for its own, which stage 0 passes on."""
    first = [*FIRST[:12], (30.0, "push", "output", 0), (31.0, "iteration", "", 2)]
    second = [
        *SECOND[:9],
        (27.0, "wait", "output", 0),
        (33.0, "ready", "output", 0),
        (33.0, "launch", "", 1),
        (37.0, "launched", "", 1),
    ]
    timeline = analyse([trace(0, first), trace(1, second)])
    assert (24, 26, BUBBLE, "output") in states(timeline, 0)  # until the last stage pushed them
    assert (27, 30, BUBBLE, "output") in states(timeline, 1)
    assert (30, 33, EXPOSED, "output") in states(timeline, 1)


def test_every_stage_has_a_push_of_its_own_when_outputs_go_to_several() -> None:
    def waiting(stage: int) -> RankTrace:
        lines = [
            (0, "launch", "", 0),
            (1, "launched", "", 0),
            (2, "wait", "output", 0),
            (9, "ready", "output", 0),
        ]
        return trace(stage, [*lines, (9, "launch", "", 1), (10, "launched", "", 1)])

    last = trace(2, [(0, "iteration", "", 0), (4, "push", "output", 0), (6, "push", "output", 0)])
    timeline = analyse([waiting(0), waiting(1), last])
    assert (4, 9, EXPOSED, "output") in states(timeline, 0)
    assert (6, 9, EXPOSED, "output") in states(timeline, 1)


@pytest.mark.parametrize(
    ("pushed_ms", "expected"),
    [
        ([], (24, 29, EXPOSED, "output")),  # no longer recorded: it was long ago
        ([29.5], (24, 29, BUBBLE, "output")),  # by a clock that is wrong by a little
    ],
)
def test_a_push_that_is_not_before_the_end_of_its_wait(
    pushed_ms: list[float], expected: tuple[float, float, str, str]
) -> None:
    second = [line for line in SECOND if line[1:] != ("push", "output", 0)]
    second += [(time, "push", "output", 0) for time in pushed_ms]
    assert expected in states(analyse([trace(0, FIRST), trace(1, sorted(second))]), 0)


def test_what_a_stage_no_longer_has_is_not_looked_at() -> None:
    """The oldest events of a long run are dropped, on each stage at another time."""
    timeline = analyse([trace(0, FIRST), trace(1, SECOND[6:])])
    assert timeline.begin_ns == 25.5 * MS
    assert states(timeline, 0)[0] == (25.5, 26, BUBBLE, "output")


def test_a_part_can_be_chosen() -> None:
    by_iteration = analyse(two_stages()).iterations(1, 1)
    assert (by_iteration.begin_ns, by_iteration.end_ns) == (13 * MS, 37 * MS)
    by_time = analyse(two_stages()).cut(12 * MS, 14 * MS)
    assert states(by_time, 0) == [(12, 13, HOST, ""), (13, 14, COMPUTE, "")]
    assert states(by_time, 1) == [(12, 14, EXPOSED, "proxy")]
    assert states(analyse(two_stages()).middle(1), 0) == [(1, 11, COMPUTE, "")]


def test_what_cannot_be_analysed_is_said() -> None:
    with pytest.raises(ValueError, match=r"traces of all stages are needed.* but there are those of: none\."):
        analyse([])
    with pytest.raises(ValueError, match=r"there are those of: 1\."):
        analyse(two_stages()[1:])
    with pytest.raises(ValueError, match=r"All stages together recorded no forward\."):
        analyse([trace(0, FIRST[:2]), trace(1, SECOND[:3])])
    with pytest.raises(ValueError, match=r"There is no forward of iterations 7 to 9, but of 0 to 1\."):
        analyse(two_stages()).iterations(7, 9)


spans = st.builds(
    lambda begin, length, state, slot: Span(begin, begin + length, state, "", slot),
    st.integers(0, 60),
    st.integers(0, 30),
    st.sampled_from([IDLE, COMPUTE, BACK_PRESSURE, EXPOSED, BUBBLE]),
    st.integers(0, 3),
)


@given(st.lists(spans, max_size=30))
def test_at_every_moment_there_is_one_state_and_it_is_the_most_important(given_spans: list[Span]) -> None:
    order = [IDLE, COMPUTE, BACK_PRESSURE, EXPOSED, BUBBLE, HOST]
    painted = _paint([Span(10, 50, HOST), *given_spans], 10, 50)
    assert painted[0].begin_ns == 10
    assert painted[-1].end_ns == 50
    for before, behind in itertools.pairwise(painted):
        assert before.end_ns == behind.begin_ns
    for moment in range(10, 50):
        (state,) = [s.state for s in painted if s.begin_ns <= moment < s.end_ns]
        there = [s.state for s in given_spans if s.begin_ns <= moment < s.end_ns]
        assert state == min([*there, HOST], key=order.index)


# --- picture and command line ------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for each in two_stages():
        each.write(tmp_path)
    return tmp_path


def test_the_command_prints_the_table_and_draws_the_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timeline", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "0.036 s, 0.000 s of them idle" in printed
    assert table(analyse(two_stages())) in printed
    assert f"Picture: {folder}/timeline.png" in printed
    assert (folder / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_names_stages_states_and_iterations(folder: Path) -> None:
    output = folder / "part.svg"
    assert main(["timeline", str(folder), "--output", str(output), "--from", "0", "--to", "36"]) == 0
    text = output.read_text()
    title = "iterations 0 to 1, from 0.0 ms behind the first launch"
    words = ["stage 0", "stage 1", "exposed wait: proxy", "bubble", "host work", title]
    assert [word for word in words if word not in text] == []
    assert "back-pressure" not in text  # there is none here


def test_the_command_can_look_at_a_part(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "part.svg"
    assert main(["timeline", str(folder), "--iterations", "1:", "--output", str(output)]) == 0
    assert "0.024 s" in capsys.readouterr().out
    assert "from 12.0 ms behind the first launch" in output.read_text()
    assert main(["timeline", str(folder), "--from", "30"]) == 0
    assert "0.006 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "3"], "The traces of all stages are needed, from 0 on, but there are those of: none."),
        (["--iterations", "5:6"], "There is no forward of iterations 5 to 6, but of 0 to 1."),
        (
            ["--from", "5", "--to", "4"],
            "--from and --to must be times in this order, of the 36 ms that there are.",
        ),
        (["--output", "a.txt"], "--output a.txt must end in .png or .svg."),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["timeline", str(folder), *arguments]) == 1
    assert capsys.readouterr().err == sentence + "\n"


def test_iterations_that_are_no_range_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("7", "a:b"):
        with pytest.raises(SystemExit):
            main(["timeline", str(folder), "--iterations", text])
        assert f"argument --iterations: '{text}' is not A:B" in capsys.readouterr().err


def test_a_part_without_a_forward_can_be_drawn(folder: Path) -> None:
    assert main(["timeline", str(folder), "--from", "10.2", "--to", "10.4"]) == 0  # stage 0 packs, 1 waits


def test_without_matplotlib_the_table_is_printed_and_a_sentence_says_how_to_get_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["timeline", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "bubble ratio" in printed.out
    expected = "The picture needs matplotlib; install it with: pip install 'sglang-npu-pp[tools]'\n"
    assert printed.err == expected
    assert not (folder / "timeline.png").exists()


# --- two pipelines in one picture ----------------------------------------------------------------


@pytest.fixture
def slower(tmp_path: Path) -> Path:
    """A folder of traces in which everything took twice as long."""
    directory = tmp_path / "slower"
    directory.mkdir()
    for stage, lines in enumerate((FIRST, SECOND)):
        slow = [(2 * time, name, kind, iteration) for time, name, kind, iteration in lines]
        trace(stage, slow).write(directory)
    return directory


def test_two_pipelines_are_drawn_to_one_scale(
    folder: Path, slower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "both.svg"
    command = ["timeline", str(folder), "--against", str(slower), "--output", str(output)]
    assert main([*command, "--from", "0", "--heading", "made by hand"]) == 0
    printed = capsys.readouterr().out
    assert f"{slower}: 0.072 s" in printed
    assert f"{folder}: 0.036 s" in printed
    assert printed.count("bubble ratio") == 2
    text = output.read_text()
    above = f"{slower.name}: 2 microbatches, 57 % of the time computing"
    below = f"{folder.name}: 2 microbatches, 57 % of the time computing"
    assert "made by hand" in text
    assert text.index(above) < text.index(below)
    assert text.count(">stage 0<") == text.count(">stage 1<") == 2
    assert text.count(">bubble<") == 1  # one legend
    assert ">70<" in text  # on the axis of both


def test_without_a_part_the_middle_of_both_is_drawn(folder: Path, slower: Path) -> None:
    output = folder / "both.svg"
    assert main(["timeline", str(folder), "--against", str(slower), "--output", str(output)]) == 0
    assert ">40<" in output.read_text()  # the forwards of stage 0 end after 44 ms, or 22
    assert ">50<" not in output.read_text()


def test_the_same_time_is_chosen_of_both(
    folder: Path, slower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["timeline", str(folder), "--against", str(slower), "--from", "1", "--to", "21"]) == 0
    assert capsys.readouterr().out.count("0.020 s") == 2


@pytest.mark.parametrize("without", [False, True])
def test_a_folder_without_traces_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], without: bool
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    directory, against = (empty, folder) if without else (folder, empty)
    assert main(["timeline", str(directory), "--against", str(against)]) == 1
    assert capsys.readouterr().err == (
        f"{empty}: The traces of all stages are needed, from 0 on, but there are those of: none.\n"
    )
