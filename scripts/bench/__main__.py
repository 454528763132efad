"""Measure upstream's pipeline parallelism, the design of SGLang pull request 19582, and ours, side by side.

python -m scripts.bench --quick --json FILE     the cells that matter most, at most 12 minutes
python -m scripts.bench                         all of them, more than an hour
python -m scripts.bench --link none             two nodes on loopback, without root: no delays
python -m scripts.bench --device npu-sim ...    on the simulated Ascend; has options of its own

Two SGLang nodes in two network namespaces, joined by a link with a set one-way delay and rate; all servers
resident, one awake at a time, measured in interleaved pairs. CPU, one core a stage.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType

from rich.console import Console

from rig.disaggregated import ENGINE
from rig.folders import new_folder
from rig.server import ServerError
from scripts.environment.parts import PartError, provide
from scripts.output import plain_console

from . import figure, pairs, report, speculation
from .competitors import ROOT, VARIABLES, VLLM, Competitor
from .link import EmulatedLink, Link, LinkError, Loopback, reason_for_loopback
from .load import LOADS, LoadError
from .measure import Measurements, measure
from .model import for_cpu
from .plan import FULL, LINKS, NO_DELAY, PAIRS, QUICK, SPECULATION, Group, LinkSetting, Work

_QUICK_S, _FULL_S = 570.0, 3 * 3600.0  # until the last repetition ends
_QUICK_REPETITIONS, _FULL_REPETITIONS = 4, 5
_EXIT_OTHER_TOKENS, _EXIT_NOT_RUN, _EXIT_INTERRUPTED = 1, 2, 130


def main() -> int:
    signal.signal(signal.SIGTERM, end_like_ctrl_c)
    signal.signal(signal.SIGHUP, end_like_ctrl_c)
    if sys.argv[1:3] == ["--device", "npu-sim"]:
        return on_simulated_ascend(sys.argv[3:])
    options = parse_command_line(sys.argv[1:])
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    console = plain_console()
    folder = new_folder(options.logs, "bench")
    try:
        right = run(options, folder, console)
    except (ServerError, LinkError, LoadError, PartError, figure.FigureError, OSError) as error:
        sentence = error.reason if isinstance(error, ServerError) else str(error)
        Console(stderr=True, highlight=False).print(f"bench: {sentence}", markup=False, soft_wrap=True)
        console.print(f"Logs: {folder}", soft_wrap=True)
        return _EXIT_NOT_RUN
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED
    if not right:
        console.print(f"bench: servers gave other tokens than upstream; logs: {folder}", soft_wrap=True)
        return _EXIT_OTHER_TOKENS
    shutil.rmtree(folder)
    return 0


def end_like_ctrl_c(number: int, frame: FrameType | None) -> None:
    """Frozen servers end with us."""
    raise KeyboardInterrupt


def on_simulated_ascend(arguments: list[str]) -> int:
    from . import npu_sim  # needs what only the tests on simulated Ascend have

    try:
        return npu_sim.main(arguments)
    except KeyboardInterrupt:
        return _EXIT_INTERRUPTED


def parse_command_line(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the cells that matter most")
    drafting = parser.add_mutually_exclusive_group()
    drafting.add_argument("--speculation", action="store_true", help="servers with EAGLE drafts, at pp 2")
    drafting.add_argument("--pairs", action="store_true", help="prefill and decode servers with NEXTN")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows and conditions there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the ratios there (.png, .svg)")
    parser.add_argument("--device", choices=("cpu", "npu-sim"), default="cpu", help="npu-sim: first of all")
    parser.add_argument("--link", choices=("auto", "none"), default="auto", help="none: loopback")
    parser.add_argument("--model-path", type=Path, help="(a random Qwen3-VL of 4 layers, width 384)")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help="also vLLM, of that interpreter")
    parser.add_argument("--pp", type=int, choices=(2, 4), help="only this pipeline size")
    parser.add_argument("--loads", help=f"only these, with commas: {','.join(LOADS)}")
    parser.add_argument("--pads", help="only these paddings in ms, with commas; also others than planned")
    parser.add_argument("--delays", help="only these one-way delays in ms, with commas")
    parser.add_argument("--depths", help="only these --pp-async-batch-depth, with commas (and upstream's 0)")
    parser.add_argument("--competitors", help=f"only these, with commas, and upstream: {','.join(VARIABLES)}")
    parser.add_argument(
        "--repetitions", type=int, help=f"{_QUICK_REPETITIONS} quick, {_FULL_REPETITIONS} else"
    )
    parser.add_argument("--skip-idle", action="store_true", help="do not measure servers without requests")
    parser.add_argument("--logs", type=Path, default=ROOT / ".run", help="where logs lie while it runs")
    options = parser.parse_args(arguments)
    if options.device != "cpu":
        parser.error("--device npu-sim must come first: it has options of its own")
    for name, known in (("loads", LOADS), ("competitors", VARIABLES)):
        unknown = set((getattr(options, name) or next(iter(known))).split(",")).difference(known)
        if unknown:
            parser.error(f"--{name}: there is no {', '.join(sorted(unknown))}, only {', '.join(known)}")
    return options


def run(options: argparse.Namespace, folder: Path, console: Console) -> bool:
    """Measure, show and write; returns whether all servers gave upstream's tokens."""
    began = time.monotonic()
    groups, links = chosen(options)
    limit_s = _QUICK_S if options.quick else _FULL_S
    model = options.model_path or model_for(options)
    found: list[Measurements] = []
    with link_of(options, folder, console) as link:
        if isinstance(link, Loopback):
            links = [setting for setting in links if setting == NO_DELAY]
        for group in groups:
            found.append(
                measure(
                    group,
                    links,
                    link,
                    model,
                    folder,
                    vllm=options.vllm,
                    idle=not options.skip_idle,
                    repetitions=options.repetitions
                    or (_QUICK_REPETITIONS if options.quick else _FULL_REPETITIONS),
                    limit_s=limit_s - (time.monotonic() - began),
                    say=lambda sentence: console.print(sentence, style="dim", soft_wrap=True),
                )
            )
        kind = link.kind
    report.show(console, found)
    seconds = time.monotonic() - began
    about = report.conditions(kind, ["python", "-m", "scripts.bench", *sys.argv[1:]], str(model))
    if options.json:
        report.write_json(options.json, found, about, seconds)
    all_rows = [row for group in found for row in report.rows(group)]
    if options.figure:
        figure.draw(all_rows, options.figure, f"SGLang {about['versions']['sglang']}, CPU, {kind}")
    console.print(f"{seconds:.0f} s, link: {kind}, load of the machine {os.getloadavg()[0]:.1f}")
    return all(row.tokens_equal or row.competitor == VLLM for row in all_rows)


def model_for(options: argparse.Namespace) -> Path:
    if options.pairs:
        provide(ENGINE.name)
        return pairs.twin()
    return speculation.target() if options.speculation else for_cpu()


def plan_for(options: argparse.Namespace) -> Sequence[Group]:
    if options.pairs:
        return PAIRS
    if options.speculation:
        return SPECULATION
    return QUICK if options.quick else FULL


def link_of(options: argparse.Namespace, folder: Path, console: Console) -> AbstractContextManager[Link]:
    """The emulated link, or loopback with the reason said."""
    reason = "--link none" if options.link == "none" else reason_for_loopback()
    if reason:
        console.print(f"Two nodes on loopback, without delays: {reason}.", style="yellow")
        return nullcontext(Loopback())
    return EmulatedLink(folder)


def chosen(options: argparse.Namespace) -> tuple[list[Group], list[LinkSetting]]:
    """The plan, narrowed by the command line."""
    loads = options.loads.split(",") if options.loads else None
    pads = [float(pad) for pad in options.pads.split(",")] if options.pads else None
    depths = [int(depth) for depth in options.depths.split(",")] if options.depths else None
    designs = options.competitors.split(",") if options.competitors else list(VARIABLES)
    delays = [float(delay) for delay in options.delays.split(",")] if options.delays else None
    groups = []
    for group in plan_for(options):
        if options.pp and group.pp != options.pp:
            continue
        works = [work for work in group.works if loads is None or work.load in loads]
        if pads is not None:
            works = [Work(name, pad) for name in dict.fromkeys(work.load for work in works) for pad in pads]
        competitors: list[Competitor] = [
            competitor
            for competitor in group.competitors
            if competitor == group.competitors[0]
            or (competitor.design in designs and (depths is None or competitor.depth in depths))
        ]
        if options.vllm and group.pp == 2:
            competitors.append(Competitor(VLLM))
        groups.append(Group(group.pp, competitors, works))
    links = [setting for setting in LINKS if delays is None]
    links = links or [LinkSetting(delay) for delay in delays or ()]
    return groups, links


if __name__ == "__main__":
    sys.exit(main())
