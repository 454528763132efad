"""What the benchmark on the simulated Ascend makes of notes whose answer is known."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from scripts.bench import npu_sim
from scripts.bench.competitors import OURS, UPSTREAM, Competitor
from scripts.bench.load import DECODE, Answers, NoAnswerError, run
from scripts.bench.npu_sim_notes import Steady, read_notes
from scripts.bench.npu_sim_probe import Host, Launch
from scripts.bench.npu_sim_report import Cell, Measurements, Run, rows

FIRST, SECOND = Competitor(UPSTREAM), Competitor(OURS)
MS = 1_000_000
STEPS, SLOTS = 40, 2
ITERATION, FORWARD, SAMPLING, WAITS, FLIGHT, HOME = 25, 20, 1, 3, 2, 0.5  # ms


def notes(path: Path, *, stage: int, faster: float = 1.0, rows_of_first: int = 16) -> Path:
    """A stage that launches a forward every iteration; the forwards of stage 1 begin one flight behind the
    ends of those of stage 0, and its outputs are known at stage 0 shortly behind their ends. Notes of a
    forward and of results come with later launches."""
    iteration = round(ITERATION * MS / faster)
    launches = []
    for number in range(STEPS + 3):
        began = number * iteration
        ended = number - 2  # whose forward has ended by then
        stretches = []
        if ended >= 0:
            begin = ended * iteration + stage * (FORWARD + FLIGHT) * MS
            tasks, waited = ended * (FORWARD + SAMPLING + WAITS) * MS, ended * WAITS * MS
            end = begin + FORWARD * MS
            stretches = [[begin, end, tasks, waited, tasks + FORWARD * MS, waited]]
        known = ended * iteration + round((2 * FORWARD + FLIGHT + HOME) * MS)
        launches.append(
            Launch(
                began,
                began + MS,
                number % SLOTS,
                number > 0,
                rows_of_first if number == 0 else 16,
                number,
                Host(cpu=number * 4 * MS, proxies=number * 2 * MS),
                [(ended % SLOTS, known)] if ended >= 0 else [],
                stretches,
            )
        )
    path.write_bytes(b"".join(msgspec.json.encode(launch) + b"\n" for launch in launches))
    return path


def steady(tmp_path: Path, stage: int, faster: float = 1.0) -> Steady:
    path = notes(tmp_path / f"stage{stage}-{faster}.launches", stage=stage, faster=faster)
    return read_notes(path, 0, STEPS * ITERATION * MS)


def test_an_iteration_is_taken_apart(tmp_path: Path) -> None:
    stage = steady(tmp_path, 0)
    assert stage.iteration_ms == pytest.approx(ITERATION)
    assert stage.waiting_ms == pytest.approx(WAITS)
    assert stage.forward_ms == pytest.approx(FORWARD)
    assert stage.other_work_ms == pytest.approx(SAMPLING)
    assert stage.idle_ms == pytest.approx(ITERATION - FORWARD - SAMPLING - WAITS)
    assert stage.per_iteration_ms(stage.host.cpu) == pytest.approx(4)
    assert stage.launching_ms == pytest.approx(1)


def test_a_load_that_is_not_steady_is_refused(tmp_path: Path) -> None:
    path = notes(tmp_path / "notes", stage=0, rows_of_first=32)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:12]))
    with pytest.raises(ValueError, match="steady decode steps"):
        read_notes(path, 0, STEPS * ITERATION * MS)


def test_a_row_compares_with_the_first_server(tmp_path: Path) -> None:
    cell = Cell(20.0, 0.2, 25.0)
    found = Measurements(2, (FIRST, SECOND))
    for competitor, faster, tokens in ((FIRST, 1.0, ((1,),)), (SECOND, 1.25, ((2,),))):
        answers = Answers(1.0, 0.1, 0.1, tokens)
        stages = [steady(tmp_path, stage, faster) for stage in range(2)]
        found.runs.setdefault(cell, {})[competitor] = [Run(answers, stages, 0.0)]
    upstream, ours = rows(found)
    assert (upstream.ratio_median, ours.ratio_median) == (1.0, 1.25)
    assert (upstream.tokens_equal, ours.tokens_equal) == (True, False)
    assert ours.iteration_ms == pytest.approx(20)
    assert upstream.idle_ms == pytest.approx(ITERATION - FORWARD - SAMPLING - WAITS)
    assert upstream.exposed_percent == pytest.approx(100 * (1 - (FORWARD + SAMPLING) / ITERATION))
    assert upstream.transfers_percent == pytest.approx(100 * (FLIGHT + HOME) / (SLOTS * ITERATION))
    assert upstream.flight_ms == pytest.approx(FLIGHT)
    assert upstream.tokens_home_ms == pytest.approx(HOME)
    # From the tokens of one microbatch to its next forward, two iterations behind the first.
    assert upstream.host_turn_ms == pytest.approx(SLOTS * ITERATION - (2 * FORWARD + FLIGHT + HOME))
    assert upstream.in_receives_ms == pytest.approx(2)


def test_a_server_that_does_not_answer_ends_the_load_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(NoAnswerError, match=r"within 0\.2 s"):
            run(url, DECODE, seed=0, limit_s=0.2)


@dataclass
class StandIn:
    """A contestant without a server; the first one hangs."""

    competitor: Competitor
    pp: int
    folder: Path
    eager: bool

    @property
    def hangs(self) -> bool:
        return self.competitor == FIRST

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def run(self, cell: Cell, seed: int) -> Run:
        return Run(Answers(1.0, 0.1, 0.1, ()), [], 0.0)


def test_a_server_that_hangs_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_sim, "Contestant", StandIn)
    said: list[str] = []
    found = npu_sim.measure(2, (FIRST, SECOND), npu_sim.QUICK, 1, tmp_path, said.append)
    assert found.hung == [FIRST]
    assert any(line.startswith("pp 2: upstream hangs") for line in said)
    assert [list(runs) for runs in found.runs.values()] == [[SECOND]]
