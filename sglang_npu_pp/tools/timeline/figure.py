"""Figure of a timeline: one row per stage, one colour per state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .states import BACK_PRESSURE, BUBBLE, COMPUTE, EXPOSED, HOST, IDLE, StageTimeline, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Distinct for colour-blind readers, and in grey. Forwards of neighbouring slots get two shades.
_COLOURS: dict[tuple[str, str], str] = {
    (COMPUTE, "even"): "#2f6ea5",
    (COMPUTE, "odd"): "#6ca6d6",
    (HOST, ""): "#d4d4d4",
    (EXPOSED, "proxy"): "#d7301f",
    (EXPOSED, "output"): "#8e2a8b",
    (EXPOSED, "requests"): "#fc8d59",
    (EXPOSED, "other"): "#5a3a22",
    (BACK_PRESSURE, ""): "#1a1a1a",
    (BUBBLE, ""): "#f8edb8",
    (IDLE, ""): "#ffffff",
}
_ROW_HEIGHT = 0.72
_WIDTH, _WIDTH_OF_SEVERAL = 14.0, 10.0  # inches; a comparison is meant for a page
_INCHES_A_ROW = 0.75
_INCHES_A_LEGEND_COLUMN = 1.75
_ROOM_FOR_A_NUMBER = 0.014  # of the axis: narrower forwards are not numbered


def draw(timelines: Sequence[tuple[str, Timeline]], path: Path, heading: str = "") -> None:
    """Write `path`, PNG or SVG by its suffix. Raises ImportError without matplotlib, ValueError for another
    suffix."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.fonttype"] = "none"  # text stays text
    rows = [len(timeline.stages) for _, timeline in timelines]
    width = _WIDTH if len(timelines) == 1 else _WIDTH_OF_SEVERAL
    height = 0.7 + 0.7 * len(timelines) + 0.3 * bool(heading) + _INCHES_A_ROW * sum(rows)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(len(timelines), sharex=True, squeeze=False, height_ratios=rows).flatten()
    length_ms = max(timeline.end_ns - timeline.begin_ns for _, timeline in timelines) / 1e6
    used: set[tuple[str, str]] = set()
    for axes, (title, timeline) in zip(panels, timelines, strict=True):
        used |= _draw_timeline(axes, timeline, length_ms)
        axes.set_title(title, loc="left")
    panels[-1].set_xlabel("ms, on the clock of stage 0")
    if heading:
        figure.suptitle(heading, x=0.01, ha="left", fontsize=9, color="#444444")
    _add_legend(figure, used, int(width / _INCHES_A_LEGEND_COLUMN))
    figure.savefig(path, dpi=150)


def _draw_timeline(axes: Axes, timeline: Timeline, length_ms: float) -> set[tuple[str, str]]:
    """Draw the rows of one timeline; returns the colours they used."""
    used: set[tuple[str, str]] = set()
    for row, stage in enumerate(timeline.stages):
        used |= _draw_stage(axes, row, stage, timeline.begin_ns, length_ms)
    axes.set_xlim(0, length_ms)
    axes.set_ylim(len(timeline.stages) - 0.5, -0.5)  # stage 0 on top
    axes.set_yticks(range(len(timeline.stages)), [f"stage {stage.stage}" for stage in timeline.stages])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return used


def _draw_stage(
    axes: Axes, row: int, stage: StageTimeline, begin_ns: int, length_ms: float
) -> set[tuple[str, str]]:
    """Draw one row; return its colours."""
    bars: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for span in stage.spans:
        begin_ms, width_ms = (span.begin_ns - begin_ns) / 1e6, (span.end_ns - span.begin_ns) / 1e6
        key = _colour_key(span.state, span.kind, span.slot)
        bars.setdefault(key, []).append((begin_ms, width_ms))
        if span.state == COMPUTE and width_ms > _ROOM_FOR_A_NUMBER * length_ms:
            centre = begin_ms + width_ms / 2
            axes.text(centre, row, str(span.iteration), ha="center", va="center", color="white", fontsize=8)
    for key, ranges in bars.items():
        axes.broken_barh(ranges, (row - _ROW_HEIGHT / 2, _ROW_HEIGHT), facecolors=_COLOURS[key], linewidth=0)
    return set(bars)


def _colour_key(state: str, kind: str, slot: int) -> tuple[str, str]:
    if state == COMPUTE:
        return state, "odd" if slot % 2 else "even"
    if state == EXPOSED:
        return state, kind if (state, kind) in _COLOURS else "other"
    return state, ""


def _add_legend(figure: Any, used: set[tuple[str, str]], columns: int) -> None:
    from matplotlib.patches import Patch

    names = {
        COMPUTE: "compute, {} slot",
        EXPOSED: "exposed wait: {}",
        BACK_PRESSURE: "back-pressure: a send waits",
    }
    handles = [
        Patch(facecolor=colour, edgecolor="#999999", lw=0.5, label=names.get(state, state).format(kind))
        for (state, kind), colour in _COLOURS.items()
        if (state, kind) in used
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        fontsize=9,
    )
