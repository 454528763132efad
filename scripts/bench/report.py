"""Rows, table and figure of a run."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.output import number_table

from .competitors import FLAGS, ROOT, Competitor, Run
from .load import LOADS
from .measure import Cell, Measurements
from .plan import NO_DELAY, LinkSetting, Work


@dataclass(frozen=True)
class Row:
    """One server in one cell. Ratios are throughput against the first server of its group, by pairs."""

    load: str
    pad_ms: float
    delay_ms: float
    rate_mbit: float
    pp: int
    depth: int
    competitor: str
    ratio_median: float
    ratio_min: float
    ratio_max: float
    n: int
    tokens_equal: bool
    tokens_per_s: float  # prompt tokens for prefill, else answered ones; median
    first_token_ms: float
    per_token_ms: float
    kept: float | None  # throughput as a part of that of the same server without delay
    delays_per_token: float | None  # how many one-way delays a token takes longer than without delay
    iteration_ms: float | None  # wall time by forward of the first stage; median
    delays_per_iteration: float | None
    exposed: float | None  # the part of an iteration that it takes longer than without delay
    shortest_ms: float | None  # no order of the same work makes an iteration shorter than this (_shortest_ms)
    compute_ms: float | None  # by forward, without padding: of the slowest stage
    host_cpu_ms: float | None  # of the scheduler thread outside the forward, by forward: of the busiest stage
    load_average: float  # of the machine, largest
    drafts: bool | None = None  # whether it speculates; None: a server of another model
    by_drafts: tuple[float, float, float] | None = None  # median, smallest, largest: throughput against the
    # same server without drafts, by pairs


def rows(found: Measurements) -> list[Row]:
    """A row for every cell and server of a group."""
    reference = found.group.competitors[0]
    made = []
    for cell, runs in found.runs.items():
        expected = [run.answers for run in runs[reference]]
        for competitor, own in runs.items():
            equal = found.tokens_equal(competitor) and all(
                run.answers.tokens == answers.tokens for run, answers in zip(own, expected, strict=True)
            )
            ratios = _ratios(runs[reference], own)
            undelayed = found.runs.get((cell[0], NO_DELAY), {}).get(competitor)
            row = _row(cell, competitor, found.group.pp, own, ratios, equal, undelayed)
            plain = runs.get(competitor.without_drafts) if competitor.drafts else None
            made.append(replace(row, by_drafts=_ratios(plain, own)) if plain else row)
    return made


def _ratios(reference: Sequence[Run], runs: Sequence[Run]) -> tuple[float, float, float]:
    """Of throughput, by pairs: median, smallest, largest."""
    found = [
        other.answers.duration_s / run.answers.duration_s for run, other in zip(runs, reference, strict=True)
    ]
    return statistics.median(found), min(found), max(found)


def _row(
    cell: Cell,
    competitor: Competitor,
    pp: int,
    runs: Sequence[Run],
    ratios: tuple[float, float, float],
    equal: bool,
    undelayed: Sequence[Run] | None,
) -> Row:
    work, link = cell
    load = LOADS[work.load]
    tokens = load.prompt_tokens if work.load == "prefill" else load.answer_tokens
    per_token_s, iteration_s = _per_token_s(runs), _iteration_s(runs)
    kept = delays_per_token = delays_per_iteration = exposed = None
    if link != NO_DELAY and undelayed:
        kept = _duration_s(undelayed) / _duration_s(runs)
        if link.delay_ms and work.load == "decode":
            delays_per_token = (per_token_s - _per_token_s(undelayed)) * 1e3 / link.delay_ms
        before_s = _iteration_s(undelayed)
        if iteration_s is not None and before_s is not None:
            exposed = (iteration_s - before_s) / iteration_s
            if link.delay_ms:
                delays_per_iteration = (iteration_s - before_s) * 1e3 / link.delay_ms
    return Row(
        load=work.load,
        pad_ms=work.pad_ms,
        delay_ms=link.delay_ms,
        rate_mbit=link.rate_mbit,
        pp=pp,
        depth=competitor.depth,
        competitor=competitor.design,
        ratio_median=ratios[0],
        ratio_min=ratios[1],
        ratio_max=ratios[2],
        n=len(runs),
        tokens_equal=equal,
        tokens_per_s=statistics.median(tokens / run.answers.duration_s for run in runs),
        first_token_ms=1e3 * statistics.median(run.answers.first_token_s for run in runs),
        per_token_ms=1e3 * per_token_s,
        kept=kept,
        delays_per_token=delays_per_token,
        iteration_ms=None if iteration_s is None else 1e3 * iteration_s,
        delays_per_iteration=delays_per_iteration,
        exposed=exposed,
        shortest_ms=_shortest_ms(runs, pp + competitor.depth, link.delay_ms),
        compute_ms=_per_launch_ms(runs, "compute_s"),
        host_cpu_ms=_per_launch_ms(runs, "host_cpu_s"),
        load_average=max(run.load_average for run in runs),
        drafts=competitor.drafts,
    )


def _duration_s(runs: Sequence[Run]) -> float:
    return statistics.median(run.answers.duration_s for run in runs)


def _per_token_s(runs: Sequence[Run]) -> float:
    return statistics.median(run.answers.per_token_s for run in runs)


def _iteration_s(runs: Sequence[Run]) -> float | None:
    return _median(run.iteration_s for run in runs if run.iteration_s is not None)


def _shortest_ms(runs: Sequence[Run], slots: int, delay_ms: float) -> float | None:
    """What an iteration takes at least: median over the runs.

    A stage has one core, for its forwards and for the host's work on them; and the round of one microbatch,
    of which `slots` are under way, is the forwards of all stages and a delay in each direction.
    """
    if not all(run.stages for run in runs):
        return None
    found = []
    for run in runs:
        stages = [stage.by_launch for stage in run.stages]
        round_s = sum(stage.forward_s for stage in stages) + 2 * delay_ms / 1e3
        busiest_s = max(stage.forward_s + stage.host_cpu_s for stage in stages)
        found.append(1e3 * max(round_s / slots, busiest_s))
    return statistics.median(found)


def _per_launch_ms(runs: Sequence[Run], name: str) -> float | None:
    """Median over the runs, of the stage that has most of it."""
    if not all(run.stages for run in runs):
        return None
    return 1e3 * statistics.median(
        max(getattr(stage.by_launch, name) for stage in run.stages) for run in runs
    )


def servers(found: Measurements) -> list[dict[str, Any]]:
    """What was measured of the servers as such."""
    return [
        {
            "pp": found.group.pp,
            "competitor": competitor.design,
            "depth": competitor.depth,
            "drafts": competitor.drafts,
            "memory_mib": found.memory_mib[competitor],
            "idle_cpu_cores": _median(rest.cpu_cores for rest in rests),
            "idle_first_token_ms": _median(1e3 * time_s for rest in rests for time_s in rest.first_tokens_s),
        }
        for competitor in found.group.competitors
        for rests in [found.idle.get(competitor, [])]
    ]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


def conditions(link_kind: str, command: Sequence[str], model: str) -> dict[str, Any]:
    """What somebody needs to know who wants to compare: versions, flags, machine."""
    packages = ("sglang", "torch", "pyzmq", "transformers")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return {
        "device": "CPU, one core a stage; padded forwards stand for an accelerator",
        "link": link_kind,
        "command": " ".join(command),
        "model": model,
        "flags": " ".join(FLAGS),
        "versions": {name: version(name) for name in packages},
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processor": _processor(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def write_json(path: Path, found: Sequence[Measurements], about: Mapping[str, Any], seconds: float) -> None:
    content = {
        "conditions": {**about, "seconds": round(seconds)},
        "rows": [asdict(row) for group in found for row in rows(group)],
        "servers": [server for group in found for server in servers(group)],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows that `write_json` wrote."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def show(console: Console, found: Sequence[Measurements]) -> None:
    """Print ratios by cell and what was measured of the servers."""
    for group in found:
        console.print(_ratio_table(rows(group)))
        console.print(_delay_table(rows(group)))
        if any(row.by_drafts for row in rows(group)):
            console.print(_drafts_table(rows(group)))
        console.print(_server_table(servers(group)))


def _ratio_table(made: Sequence[Row]) -> Table:
    links = list(dict.fromkeys(LinkSetting(row.delay_ms, row.rate_mbit) for row in made))
    title = f"pp {made[0].pp}: throughput, times that of upstream at depth 0 (median of pairs)"
    table = number_table(title, "load", "server", *map(str, links), left=2)
    by_place = {(_work(row), name_of(row), LinkSetting(row.delay_ms, row.rate_mbit)): row for row in made}
    for work in dict.fromkeys(_work(row) for row in made):
        for name in dict.fromkeys(name_of(row) for row in made):
            cells = [by_place.get((work, name, link)) for link in links]
            table.add_row(str(work), name, *(_cell_text(row) for row in cells))
        table.add_section()
    return table


def _drafts_table(made: Sequence[Row]) -> Table:
    title = (
        f"pp {made[0].pp}: throughput with drafts, times that of the same server without (median of pairs)"
    )
    table = number_table(title, "load", "link", "server", "times", left=3)
    for row in made:
        if row.by_drafts:
            median, smallest, largest = row.by_drafts
            link = LinkSetting(row.delay_ms, row.rate_mbit)
            text = f"{median:.2f} [{smallest:.2f}..{largest:.2f}]"
            table.add_row(str(_work(row)), str(link), name_of(row), text)
    return table


def _cell_text(row: Row | None) -> str:
    if row is None:
        return ""
    wrong = "" if row.tokens_equal else "  OTHER TOKENS"
    return f"{row.ratio_median:.2f} [{row.ratio_min:.2f}..{row.ratio_max:.2f}]{wrong}"


def _server_table(made: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("server", "memory", "CPU when idle", "first token after idling")
    table = number_table("servers: schedulers only, without requests", *columns)
    for server in made:
        name = Competitor(server["competitor"], server["depth"], server["drafts"]).name
        table.add_row(
            name,
            f"{server['memory_mib']:.0f} MiB",
            _number(server["idle_cpu_cores"], "{:.1%} of a core"),
            _number(server["idle_first_token_ms"], "{:.1f} ms"),
        )
    return table


def _work(row: Row) -> Work:
    return Work(row.load, row.pad_ms)


def name_of(row: Row) -> str:
    return Competitor(row.competitor, row.depth, row.drafts).name


def _delay_table(made: Sequence[Row]) -> Table:
    """What a delay costs each server, against itself without delay."""
    title = f"pp {made[0].pp}: what the link costs a server, against itself without delay"
    columns = ("load", "link", "server", "tokens/s", "kept", "iteration", "at least", "delays an iteration")
    table = number_table(title, *columns, "exposed", "delays a token", "host CPU", left=3)
    for row in made:
        table.add_row(
            str(_work(row)),
            str(LinkSetting(row.delay_ms, row.rate_mbit)),
            name_of(row),
            f"{row.tokens_per_s:.0f}",
            _number(row.kept, "{:.0%}"),
            _number(row.iteration_ms, "{:.1f} ms"),
            _number(row.shortest_ms, "{:.1f} ms"),
            _number(row.delays_per_iteration, "{:.2f}"),
            _number(row.exposed, "{:.1%}"),
            _number(row.delays_per_token, "{:.2f}"),
            _number(row.host_cpu_ms, "{:.2f} ms"),
        )
    return table


def _number(value: float | None, style: str) -> str:
    return "" if value is None else style.format(value)
