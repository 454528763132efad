"""`python -m sglang_npu_pp timeline DIR`: the pipeline as a figure, its times as a table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...observe.trace import read_traces
from .states import COMPUTE, IDLE, Timeline, analyse, table

FORWARDS_IN_A_PICTURE = 24  # of a stage, when nothing says which to draw
FORWARDS_AGAINST = 8  # of the slower of two pipelines
_NO_MATPLOTLIB = "The picture needs matplotlib; install it with: pip install 'sglang-npu-pp[tools]'"


def add(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "timeline",
        help="draw the pipeline from its traces; print bubble ratio and exposed communication",
        description="Reads what SGLANG_NPU_PP_TRACE=DIR made the ranks write. Prints the shares of compute, "
        "bubble and exposed communication of every stage, and draws them. "
        "sglang_npu_pp/tools/timeline/states.py says what these words mean exactly.",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the traces are")
    parser.add_argument(
        "--against", type=Path, metavar="DIR", help="draw the pipeline of these traces above, to one scale"
    )
    parser.add_argument("--heading", default="", metavar="TEXT", help="what the picture shows, above it")
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG or SVG (DIR/timeline.png)")
    parser.add_argument("--rank", type=int, default=0, help="tensor-parallel rank to look at (0)")
    parser.add_argument("--replica", type=int, default=0, help="data-parallel replica to look at (0)")
    parser.add_argument("--iterations", type=_range, metavar="A:B", help="only these scheduler iterations")
    parser.add_argument(
        "--from", type=float, metavar="MS", dest="begin", help="begin here, ms from the first launch"
    )
    parser.add_argument(
        "--to", type=float, metavar="MS", dest="end", help="end here, ms from the first launch"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table and draw the figure. Exit code 1, with one sentence, on failure."""
    output = options.output or options.directory / "timeline.png"
    try:
        if output.suffix not in (".png", ".svg"):
            raise ValueError(f"--output {output} must end in .png or .svg.")
        _one(options, output) if options.against is None else _both(options, output)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except ImportError:
        print(_NO_MATPLOTLIB, file=sys.stderr)
        return 1
    print(f"\nPicture: {output}")
    return 0


def _one(options: argparse.Namespace, output: Path) -> None:
    whole = analyse(read_traces(options.directory, options.rank, options.replica))
    part = _chosen(options, whole)
    print(f"{_describe(part)}\n\n{table(part)}")
    drawn = whole.middle(FORWARDS_IN_A_PICTURE) if part is whole else part
    _draw([(_title(drawn, whole), drawn)], output, options.heading)


def _both(options: argparse.Namespace, output: Path) -> None:
    directories = (options.against, options.directory)
    wholes = [_analysed(options, directory) for directory in directories]
    parts = [_chosen(options, whole) for whole in wholes]
    for directory, part in zip(directories, parts, strict=True):
        print(f"{directory}: {_describe(part)}\n\n{table(part)}\n")
    drawn = _equally_long(wholes, parts)
    titles = map(_summary, directories, drawn)
    _draw(list(zip(titles, drawn, strict=True)), output, options.heading)


def _equally_long(wholes: Sequence[Timeline], parts: Sequence[Timeline]) -> list[Timeline]:
    """Each from where its part begins, for as long as the longest; without a chosen part, from the middle."""
    shown = [
        whole.middle(FORWARDS_AGAINST) if part is whole else part
        for whole, part in zip(wholes, parts, strict=True)
    ]
    length_ns = max(part.end_ns - part.begin_ns for part in shown)
    return [
        whole.cut(part.begin_ns, part.begin_ns + length_ns) for whole, part in zip(wholes, shown, strict=True)
    ]


def _analysed(options: argparse.Namespace, directory: Path) -> Timeline:
    """Of one of several folders; errors name it."""
    try:
        return analyse(read_traces(directory, options.rank, options.replica))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def _range(text: str) -> tuple[int, int]:
    """First and last of A:B; either may be missing."""
    try:
        first, last = text.split(":")
        return int(first or 0), int(last or 1 << 62)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not A:B, the first and the last of them") from None


def _chosen(options: argparse.Namespace, whole: Timeline) -> Timeline:
    """The part named by the options, or `whole`. Raises ValueError for an empty one."""
    if options.iterations is not None:
        return whole.iterations(*options.iterations)
    if options.begin is None and options.end is None:
        return whole
    begin_ns = whole.begin_ns + round(1e6 * (options.begin or 0))
    end_ns = whole.end_ns if options.end is None else whole.begin_ns + round(1e6 * options.end)
    if not whole.begin_ns <= begin_ns < min(end_ns, whole.end_ns):
        length_ms = (whole.end_ns - whole.begin_ns) / 1e6
        raise ValueError(
            f"--from and --to must be times in this order, of the {length_ms:.0f} ms that there are."
        )
    return whole.cut(begin_ns, end_ns)


def _describe(timeline: Timeline) -> str:
    length = (timeline.end_ns - timeline.begin_ns) / 1e9
    return (
        f"{length:.3f} s, {timeline.stages[0].seconds(IDLE):.3f} s of them idle: shares are of the rest, "
        "milliseconds per microbatch."
    )


def _title(part: Timeline, whole: Timeline) -> str:
    numbers = [span.iteration for stage in part.stages for span in stage.spans if span.state == COMPUTE]
    which = f"iterations {min(numbers)} to {max(numbers)}" if numbers else "no iteration"
    begin_ms = (part.begin_ns - whole.begin_ns) / 1e6
    return f"{which}, from {begin_ms:.1f} ms behind the first launch"


def _summary(directory: Path, part: Timeline) -> str:
    computing_s = sum(stage.seconds(COMPUTE) for stage in part.stages)
    length_s = (part.end_ns - part.begin_ns) / 1e9 * len(part.stages)
    name, microbatches = directory.resolve().name, part.stages[0].launches
    return f"{name}: {microbatches} microbatches, {100 * computing_s / length_s:.0f} % of the time computing"


def _draw(timelines: Sequence[tuple[str, Timeline]], output: Path, heading: str) -> None:
    from .figure import draw

    draw(timelines, output, heading)
