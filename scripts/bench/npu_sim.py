"""Upstream's pipeline parallelism, the design of SGLang pull request 19582 and ours, on the simulated Ascend.

python -m scripts.bench --device npu-sim --quick    pp 2, forwards of 20 ms, links of 0.2 ms and 25 GB/s
python -m scripts.bench --device npu-sim            all cells, more than half an hour

SGLang `--device npu`, the unmodified torch_npu, real host work; a forward takes the time that a cell asks for
on its stream, and uses no core for it; links have a latency and a rate. Nothing here says how fast an Ascend
is: it says what the host and the links add to forwards of a given time. All servers of a pipeline size are
resident, one awake at a time; every repetition visits every cell, odd ones visit the servers backwards.
A server that hangs is named and left out. The design of the pull request does: its proxies leave before the
outputs are received, and on HCCL, where a send is a rendezvous, its two stages then wait for each other.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

from ascend_sim.controls import Simulator
from rig.devices import EAGER
from rig.folders import new_folder
from rig.probes import probe_variables
from rig.server import Server, ServerError

from . import load, npu_sim_report
from .competitors import FROZEN_LIMIT_S, NOT_AHEAD, OURS, PULL_REQUEST, ROOT, UPSTREAM, VARIABLES, Competitor
from .model import for_simulated_ascend
from .npu_sim_notes import read_notes
from .npu_sim_probe import Control, control_path, notes_path
from .npu_sim_report import Cell, Measurements, Run
from .resident import Say, resident, turns

_START_LIMIT_S = 600.0
_WARM_UP_LIMIT_S = 90.0  # some seconds are usual; who has not answered by then hangs
_PRIORITY = -15  # of threads, as `nice` counts
_TAIL_S = 0.3  # behind a load, until the last forwards of other microbatches have ended

FLAGS = (
    *("--dtype", "float32"),  # so that answers do not depend on which requests share a batch
    *("--max-total-tokens", "16384"),
    *("--chunked-prefill-size", "1024"),
    *("--watchdog-timeout", FROZEN_LIMIT_S),
    *("--stream-interval", "8"),
    "--disable-radix-cache",
    "--skip-server-warmup",
)

# Of the sizes of the load's microbatches, which those of rig.devices are not.
GRAPHS = ("--cuda-graph-bs-decode", "1", "2", "4", "8", "16")

# A message of the tiny model has 1/16 of the bytes that one of hidden size 4096 in bfloat16 has: links carry
# it at 1/16 of their rate.
BYTES_SCALE = 16


# The first is what the others are compared with.
COMPETITORS = (
    *(Competitor(UPSTREAM), Competitor(PULL_REQUEST)),
    *(Competitor(OURS), Competitor(NOT_AHEAD), Competitor(OURS, 1)),
)


FORWARDS_MS, LATENCIES_MS, RATES_GB_PER_S = (5.0, 20.0, 60.0), (0.02, 0.2, 1.0), (25.0, 3.0)
FULL = [Cell(*values) for values in product(FORWARDS_MS, LATENCIES_MS, RATES_GB_PER_S)]
QUICK = [Cell(20.0, 0.2, 25.0)]


class Contestant:
    """A competitor's server, resident while others are measured: frozen except in `run`."""

    def __init__(self, competitor: Competitor, pp: int, folder: Path, eager: bool = False) -> None:
        """`eager`: decode without graphs."""
        self.competitor, self.pp = competitor, pp
        self._folder = folder / f"pp{pp}-{competitor.name.replace(' ', '-')}"
        self._folder.mkdir(parents=True)
        self._control = Control.create(control_path(self._folder))
        variables = {
            **VARIABLES[competitor.design],
            **probe_variables("scripts.bench.npu_sim_probe", paths=[ROOT]),
            "BENCH_FOLDER": str(self._folder),
        }
        self.server = Server(
            for_simulated_ascend(pp),
            1,
            pp,
            log=self._folder / "log",
            device="npu-sim",
            env=variables,
            args=(*FLAGS, *(EAGER if eager else GRAPHS), "--pp-async-batch-depth", str(competitor.depth)),
        )
        self._links: list[Simulator] = []
        self.hangs = False

    def start(self) -> None:
        """Start, warm up and freeze the server; if it `hangs`, end it. Raises ServerError, LoadError."""
        self.server.start()
        self.server.wait_ready(_START_LIMIT_S)
        self._links = [Simulator(pid) for pid in self.server.scheduler_pids()]
        try:
            load.run(self.server.url, load.DECODE, seed=0, limit_s=_WARM_UP_LIMIT_S)
        except load.NoAnswerError:
            self.hangs = True
            self.stop()
            return
        self._favour()
        self.server.freeze()

    def _favour(self) -> None:
        """Give the server's threads the machine before other work on it, where this user may."""
        for process in self.server._track():
            for thread in process.threads():
                with suppress(PermissionError, ProcessLookupError):
                    os.setpriority(os.PRIO_PROCESS, thread.id, _PRIORITY)

    def stop(self) -> None:
        for simulator in self._links:
            simulator.close()
        self.server.thaw()
        self.server.stop()

    def run(self, cell: Cell, seed: int) -> Run:
        """Wake the server, give it the load, and freeze it again."""
        self.server.thaw()
        try:
            self._set(cell)
            load.run(self.server.url, load.SETTLE, seed)
            began = time.monotonic_ns()
            answers = load.run(self.server.url, load.DECODE, seed)
            ended = time.monotonic_ns()
            time.sleep(_TAIL_S)
            load.run(self.server.url, load.SETTLE, seed)  # its launches note the last forwards' ends
        finally:
            self.server.freeze()
        stages = [read_notes(notes_path(self._folder, stage), began, ended) for stage in range(self.pp)]
        return Run(answers, stages, os.getloadavg()[0])

    def _set(self, cell: Cell) -> None:
        self._control.forward_us = round(1e3 * cell.forward_ms)
        for simulator in self._links:
            simulator.links(
                us_per_message=round(1e3 * cell.latency_ms),
                mb_per_s=round(1e3 * cell.gb_per_s / BYTES_SCALE),
            )


def measure(
    pp: int,
    competitors: Sequence[Competitor],
    cells: Sequence[Cell],
    repetitions: int,
    folder: Path,
    say: Say,
    *,
    eager: bool = False,
) -> Measurements:
    found = Measurements(pp, competitors)
    made = (Contestant(competitor, pp, folder, eager) for competitor in competitors)
    with resident(made, say) as up:
        found.hung = [competitor for competitor, contestant in up.items() if contestant.hangs]
        for competitor in found.hung:
            say(f"pp {pp}: {competitor.name} hangs: no answer within {_WARM_UP_LIMIT_S:g} s; it is left out")
        contestants = {c: contestant for c, contestant in up.items() if not contestant.hangs}
        for repetition in range(repetitions):
            began = time.monotonic()
            for cell in cells:
                for contestant in turns(contestants, repetition):
                    runs = found.runs.setdefault(cell, {}).setdefault(contestant.competitor, [])
                    runs.append(contestant.run(cell, seed=1 + repetition))
            seconds = time.monotonic() - began
            say(f"pp {pp}: repetition {repetition + 1} of {repetitions} in {seconds:.0f} s")
    return found


def parse_command_line(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench --device npu-sim",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="one cell at pp 2, about five minutes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows and conditions there")
    parser.add_argument("--pp", type=int, choices=(2, 4), help="only this pipeline size")
    parser.add_argument("--eager", action="store_true", help="decode without graphs")
    parser.add_argument("--forwards", help="only these times of a forward in ms, with commas")
    parser.add_argument("--latencies", help="only these latencies in ms, with commas")
    parser.add_argument("--rates", help="only these rates in GB/s, with commas")
    parser.add_argument(
        "--competitors", help="only these, with commas: " + ",".join(c.name for c in COMPETITORS)
    )
    parser.add_argument("--repetitions", type=int, help="4 quick, 3 else")
    parser.add_argument("--logs", type=Path, default=ROOT / ".run", help="where logs lie while it runs")
    parser.add_argument(
        "--keep-notes", action="store_true", help="leave logs and notes of all launches there"
    )
    return parser.parse_args(arguments)


def chosen_cells(options: argparse.Namespace) -> list[Cell]:
    def numbers(text: str | None, otherwise: Sequence[float]) -> Sequence[float]:
        return [float(number) for number in text.split(",")] if text else otherwise

    if options.quick:
        return QUICK
    axes = (
        numbers(options.forwards, FORWARDS_MS),
        numbers(options.latencies, LATENCIES_MS),
        numbers(options.rates, RATES_GB_PER_S),
    )
    return [Cell(*values) for values in product(*axes)]


def main(arguments: Sequence[str]) -> int:
    """0: all servers gave upstream's tokens; 1: one did not; 2: not run."""
    options = parse_command_line(arguments)
    folder = new_folder(options.logs, "npu-sim")
    competitors = [
        c for c in COMPETITORS if not options.competitors or c.name in options.competitors.split(",")
    ]
    sizes = [options.pp] if options.pp else [2] if options.quick else [2, 4]
    repetitions = options.repetitions or (4 if options.quick else 3)
    began = time.monotonic()
    try:
        cells, eager = chosen_cells(options), options.eager
        found = [measure(pp, competitors, cells, repetitions, folder, say=print, eager=eager) for pp in sizes]
    except (ServerError, load.LoadError, ValueError) as error:
        print(f"bench: {error}\nLogs: {folder}", file=sys.stderr)
        return 2
    rows = [row for group in found for row in npu_sim_report.rows(group)]
    hung = [f"{competitor.name}, pp {group.pp}" for group in found for competitor in group.hung]
    npu_sim_report.show(rows, hung)
    if options.json:
        npu_sim_report.write_json(options.json, rows, hung, seconds=time.monotonic() - began)
    if not all(row.tokens_equal for row in rows):
        print(f"bench: servers gave other tokens than upstream; logs: {folder}", file=sys.stderr)
        return 1
    if not options.keep_notes:
        shutil.rmtree(folder)
    return 0
