"""Serve every command line with stages that is published for Ascend, scaled down, on the simulated Ascend.

    scripts/topologies.py                       all ten, each at two stages of two ranks and at four
    scripts/topologies.py --stages 2 --lines glm5_1

Lines that are equal once they are scaled share a server. Each gets a decode server, which drafts where it
does; they are asked prompts of 1 to 600 tokens, and have to answer as a plain forward of the model does. The
exit status is 0 when all do.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from rig.launcher import Launcher  # noqa: E402
from rig.published_lines import PARTITIONS, RELEASE, serve  # noqa: E402
from rig.server import ServerError  # noqa: E402
from rig.sparse_reference import differences  # noqa: E402
from scripts.environment.parts import PartError, provide  # noqa: E402
from scripts.output import plain_console  # noqa: E402
from sglang_npu_pp.tools.published import PUBLISHED, Published  # noqa: E402

console = plain_console(160)


class Served(NamedTuple):
    """What came of lines that are one server here."""

    lines: list[Published]
    stages: int
    wrong: list[str]
    seconds: float

    @property
    def verdict(self) -> str:
        return "WRONG" if self.wrong else "as a plain forward"


def main() -> int:
    options = parse_command_line()
    chosen = [line for line in PUBLISHED if any(text in line.name for text in options.lines)]
    if not chosen:
        console.print(f"topologies: no line has {' or '.join(options.lines)} in its name", markup=False)
        return 1
    try:
        provide(*([RELEASE.part.name] if RELEASE.part else []))
    except PartError as error:
        console.print(f"topologies: {error}", markup=False)
        return 1
    found: list[Served] = []
    for served in run(chosen, options.stages):
        found.append(served)
        verdict = f"{served.verdict} ({served.seconds:.0f} s)"
        console.print(f"{served.lines[0].name}, {served.stages} stages: {verdict}", markup=False)
        for complaint in served.wrong:
            console.print(f"{served.lines[0].name}, {served.stages} stages: {complaint}", markup=False)
    console.print(table(found))
    return 1 if any(served.wrong for served in found) else 0


def parse_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stages = list(PARTITIONS)
    parser.add_argument("--stages", nargs="+", type=int, choices=stages, default=stages, metavar="N")
    parser.add_argument(
        "--lines", nargs="+", default=[""], metavar="TEXT", help="only lines with one of these in their name"
    )
    return parser.parse_args()


def run(lines: list[Published], stages: list[int]) -> Iterator[Served]:
    for count in stages:
        for alike in same_server(lines, count):
            begin = time.monotonic()
            wrong = wrong_with(alike[0], count)
            yield Served(alike, count, wrong, time.monotonic() - begin)


def same_server(lines: list[Published], stages: int) -> list[list[Published]]:
    groups: dict[tuple[str, ...], list[Published]] = {}
    for line in lines:
        groups.setdefault(line.scaled(stages), []).append(line)
    return list(groups.values())


def wrong_with(line: Published, stages: int) -> list[str]:
    folder = Path(tempfile.mkdtemp(prefix="topologies-"))
    try:
        answers, reference = serve(Launcher(folder), line, stages)
        wrong = differences(reference, answers)
    except (ServerError, AssertionError) as error:
        wrong = [str(error)]
    if wrong:
        return [*wrong, f"logs are in {folder}"]
    shutil.rmtree(folder)
    return []


def table(found: list[Served]) -> Table:
    made = Table(title=f"SGLang {RELEASE.name} on the simulated Ascend")
    for name in ("published line", "stages", "tokens a chunk", "draft", "answers", "seconds"):
        made.add_column(name, no_wrap=True)
    for served in found:
        for line in served.lines:
            options = line.scaled(served.stages)
            chunk = options[options.index("--chunked-prefill-size") + 1]
            draft = "NEXTN" if line.drafts else "none"
            made.add_row(line.name, str(served.stages), chunk, draft, served.verdict, f"{served.seconds:.0f}")
    return made


if __name__ == "__main__":
    sys.exit(main())
