"""Run the core of the suite on every supported SGLang release and print release x layout x verdict.

    scripts/matrix.py                                    everything: about 96 starts of a server, two hours
    scripts/matrix.py --releases 0.5.15 0.5.23 --layouts tp1-pp2 --json result.json
    scripts/matrix.py --torch-npu 2.10.0                 instead tests/ascend, on that torch_npu and its torch

A cell starts the release unpatched and patched, asks both the same requests, one by one and sixteen at a
time, and compares answers and recorded order (rig/comparison.py, which the suite uses too). The exit
status is 0 when all cells are good, 1 when one is not, 130 when interrupted; what has run is printed anyway.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import FrameType

from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from rig.comparison import Layout, compare, complaints, depth  # noqa: E402
from rig.launcher import Launcher  # noqa: E402
from rig.releases import RELEASES, Release  # noqa: E402
from rig.server import ServerError  # noqa: E402
from scripts.environment import torch_npu  # noqa: E402
from scripts.environment.installer import InstallerError  # noqa: E402
from scripts.environment.parts import PartError, provide  # noqa: E402
from scripts.output import plain_console  # noqa: E402

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("tp1-pp2", 1, 2),
        Layout("tp1-pp2-depth1", 1, 2, {"args": depth(1)}),
        Layout("tp1-pp4", 1, 4),
        Layout("tp2-pp2", 2, 2),
    )
}

_running: list[Launcher] = []

console = plain_console(160)


@dataclass
class Cell:
    """What came out of one layout of one release."""

    release: str
    layout: str
    seconds: float
    wrong: Mapping[str, Sequence[str]]  # check -> complaints; empty when all is well
    torch_pin: str
    torch_here: str
    transformers_pin: str
    transformers_here: str
    left_out: Mapping[str, str] = field(default_factory=dict)  # cases that were not asked, and why
    alone: Mapping[str, str] = field(default_factory=dict)  # cases that were asked one by one only, and why
    logs: str = ""  # where they are, when something is wrong

    @property
    def verdict(self) -> str:
        return "WRONG" if self.wrong else "same"


def main() -> int:
    options = parse_command_line()
    if options.torch_npu:
        return run_on_torch_npu(options.torch_npu)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    cells: list[Cell] = []
    interrupted = False
    try:
        install(options.releases)
        for cell in run(options.releases, options.layouts):
            cells.append(cell)
            console.print(f"{cell.release} {cell.layout}: {cell.verdict} ({cell.seconds:.0f} s)")
            if options.json:
                options.json.write_text(json.dumps([asdict(each) for each in cells], indent=1) + "\n")
    except PartError as error:
        console.print(f"matrix: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        interrupted = True
    show(cells)
    if interrupted:
        console.print("Interrupted: the other cells did not run.")
        return 130
    return 1 if any(cell.wrong for cell in cells) else 0


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--releases", nargs="+", choices=RELEASES, default=list(RELEASES), metavar="RELEASE")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), metavar="LAYOUT")
    parser.add_argument("--json", type=Path, help="write all cells, with every complaint, to this file")
    parser.add_argument(
        "--torch-npu",
        metavar="VERSION",
        help="run tests/ascend on it, and on its torch (a download of 300 MB)",
    )
    return parser.parse_args()


def run_on_torch_npu(version: str) -> int:
    """Exit status of tests/ascend on the simulated Ascend; 1 where one of the packages is not to be had."""
    try:
        environ = torch_npu.environment(version)
    except InstallerError as error:
        console.print(f"matrix: {error}", markup=False)
        return 1
    console.print(f"tests/ascend on torch_npu {version} and torch {torch_npu.torch_of(version)}")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/ascend"]
    required = {"REQUIRE_ASCEND_SIM": "1"}  # not to skip everything
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **required, **environ}, check=False
    ).returncode


def install(releases: Sequence[str]) -> None:
    """What is there already stays as it is."""
    provide(*(part.name for release in releases if (part := RELEASES[release].part)))


def run(releases: Sequence[str], layouts: Sequence[str]) -> Iterator[Cell]:
    """Layout by layout, so that an interrupted run has seen every release."""
    for layout in layouts:
        for release in releases:
            yield run_cell(RELEASES[release], LAYOUTS[layout])


def run_cell(release: Release, layout: Layout) -> Cell:
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix=f"matrix-{release.name}-{layout.name}-"))
    launcher = Launcher(folder)
    _running.append(launcher)
    try:
        wrong = complaints(compare(launcher, layout, release))
    except (ServerError, OSError, AssertionError) as error:  # requests' errors are OSErrors
        wrong = {"a server failed": [f"server {launcher.started} of 2: {type(error).__name__}: {error}"]}
    finally:
        launcher.stop_all()
        _running.remove(launcher)
    if not wrong:
        shutil.rmtree(folder)
    return Cell(
        release=release.name,
        layout=layout.name,
        seconds=time.monotonic() - started,
        wrong=wrong,
        torch_pin=release.pin("torch"),
        torch_here=metadata.version("torch"),
        transformers_pin=release.pin("transformers"),
        transformers_here=metadata.version("transformers"),
        left_out=release.left_out,
        alone=release.alone,
        logs=str(folder) if wrong else "",
    )


def show(cells: Sequence[Cell]) -> None:
    table = Table(title="SGLang patched against itself unpatched, on CPU")
    for column in ("release", "torch: pinned / here", "transformers: pinned / here", "layout", "verdict"):
        table.add_column(column, no_wrap=True)
    table.add_column("what differed, or was left out")
    for cell in cells:
        table.add_row(
            cell.release,
            f"{cell.torch_pin} / {cell.torch_here}",
            f"{cell.transformers_pin} / {cell.transformers_here}",
            cell.layout,
            f"[red]{cell.verdict}[/red]" if cell.wrong else f"[green]{cell.verdict}[/green]",
            remarks(cell),
        )
    console.print(table)
    reasons = {case: why for cell in cells for case, why in {**cell.left_out, **cell.alone}.items()}
    for reason in dict.fromkeys(reasons.values()):
        console.print(f"{', '.join(case for case in reasons if reasons[case] == reason)}: {reason}.")


def remarks(cell: Cell) -> str:
    if not cell.wrong:
        lines = [f"not asked: {', '.join(cell.left_out)}"] if cell.left_out else []
        return "\n".join([*lines, *(f"not in company: {case}" for case in cell.alone)])
    found = [f"{check} ({len(lines)}): {lines[0][:200]}" for check, lines in cell.wrong.items()]
    return "\n".join([*found, f"logs: {cell.logs}"])


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """The server ends first: threads that wait for its answers would hold up the end of this process."""
    for launcher in _running:
        launcher.stop_all()
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
