"""report.png: throughput and latencies of both servers by round, and the pipeline of the patched one."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..timeline.figure import draw as draw_timeline
from ..timeline.states import Timeline
from .comparing import Compared, compare_speeds
from .results import Report, Side

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN = ("output tokens/s", "TTFT ms, median", "TPOT ms, median", "ITL ms, median")
FORWARDS = 16  # of a stage, from the middle
_DOTS_PER_INCH = 120
_COLOURS = {Side.UNPATCHED: "#8c8c8c", Side.PATCHED: "#2f6ea5"}
_BAR = 0.38  # of the distance between two rounds


def draw(report: Report, path: Path, timeline: Timeline | None = None) -> None:
    """Write a PNG. Raises ImportError without matplotlib, ValueError where there is nothing to draw."""
    images = []
    if report.speeds:
        images.append(_speeds(report))
    if timeline is not None:
        images.append(_timeline(report, timeline))
    if not images:
        raise ValueError("Neither speed nor traces were recorded, so there is nothing to draw.")
    _below_each_other(images).save(path)


def _speeds(report: Report) -> Image:
    """A row for each load, a panel for each measure."""
    from matplotlib.figure import Figure

    loads = compare_speeds(report.speeds)
    figure = Figure(figsize=(14, 0.6 + 2.8 * len(loads)), layout="constrained")
    panels = figure.subplots(len(loads), len(SHOWN), squeeze=False)
    for row, (load, measures) in zip(panels, loads.items(), strict=True):
        by_name = {measure.name: measure for measure in measures}
        for axes, name in zip(row, SHOWN, strict=True):
            _bars(axes, by_name[name])
        row[0].set_title(f"{load}\n{name_of(SHOWN[0])}", loc="left", fontsize=9)
    figure.suptitle(
        f"SGLang {report.build}, {report.device or 'device not known'}", x=0.01, ha="left", fontsize=10
    )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return _image(figure)


def name_of(measure: str) -> str:
    return measure.replace(" ms,", ", ms,")


def _bars(axes: Any, measure: Compared) -> None:
    for offset, side in zip((-_BAR / 2, _BAR / 2), Side, strict=True):
        values = measure.values[side]
        places = [turn + offset for turn in values]
        axes.bar(places, list(values.values()), width=_BAR, color=_COLOURS[side], label=side.value)
    axes.set_title(name_of(measure.name), loc="left", fontsize=9)
    axes.set_xticks(measure.rounds, [f"round {turn}" for turn in measure.rounds], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _timeline(report: Report, timeline: Timeline) -> Image:
    with TemporaryDirectory(prefix="sglang-npu-pp-") as folder:
        path = Path(folder) / "timeline.png"
        heading = f"pipeline of the patched server, {report.device or 'device not known'}"
        draw_timeline([("", timeline.middle(FORWARDS))], path, heading)
        return _opened(path.read_bytes())


def _image(figure: Any) -> Image:
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=_DOTS_PER_INCH)
    return _opened(written.getvalue())


def _opened(png: bytes) -> Image:
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.load()
    return image


def _below_each_other(images: Sequence[Image]) -> Image:
    """All as wide as the widest."""
    from PIL import Image

    width = max(image.width for image in images)
    scaled = [
        image if image.width == width else image.resize((width, round(image.height * width / image.width)))
        for image in images
    ]
    whole = Image.new("RGB", (width, sum(image.height for image in scaled)), "white")
    top = 0
    for image in scaled:
        whole.paste(image, (0, top))
        top += image.height
    return whole
