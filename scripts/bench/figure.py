"""The figure of a run: a panel for every load, bars by link, servers side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .plan import LinkSetting, Work
from .report import Row, name_of

_COLOURS = ("#8c8c8c", "#d9a441", "#1f6f8b", "#3fa7a0", "#7bc8a4", "#b0b0b0")
_PANEL_INCHES = (4.6, 3.4)
_COLUMNS = 3


class FigureError(RuntimeError):
    """The figure cannot be drawn; the message is one sentence."""


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """Write the figure as PNG or SVG, by the suffix of `path`. Raises FigureError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FigureError(
            "drawing needs matplotlib: pip install matplotlib, or leave --figure away"
        ) from None
    panels = list(dict.fromkeys((row.pp, Work(row.load, row.pad_ms)) for row in rows))
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (pp, work) in zip(axes, panels, strict=False):
        chosen = [row for row in rows if row.pp == pp and Work(row.load, row.pad_ms) == work]
        _draw_panel(axis, chosen, f"pp {pp}: {work}")
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)


def _draw_panel(axis: object, rows: Sequence[Row], title: str) -> None:
    links = list(dict.fromkeys(LinkSetting(row.delay_ms, row.rate_mbit) for row in rows))
    names = list(dict.fromkeys(name_of(row) for row in rows))
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        own = {LinkSetting(row.delay_ms, row.rate_mbit): row for row in rows if name_of(row) == name}
        places = [place + (index - (len(names) - 1) / 2) * width for place in range(len(links))]
        medians = [own[link].ratio_median for link in links]
        spread = [
            [own[link].ratio_median - own[link].ratio_min for link in links],
            [own[link].ratio_max - own[link].ratio_median for link in links],
        ]
        colour = _COLOURS[index % len(_COLOURS)]
        bars = axis.bar(  # type: ignore[attr-defined]
            places, medians, width, yerr=spread, label=name, color=colour, error_kw={"lw": 0.8}
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)  # type: ignore[attr-defined]
    axis.set_xticks(range(len(links)), [str(link) for link in links])  # type: ignore[attr-defined]
    axis.set_yscale("log", base=2)  # type: ignore[attr-defined]
    axis.set_ylim(bottom=0.5)  # type: ignore[attr-defined]
    axis.axhline(1, color="black", lw=0.6)  # type: ignore[attr-defined]
    axis.yaxis.set_major_formatter("{x:g}")  # type: ignore[attr-defined]
    axis.set_title(title, fontsize=9)  # type: ignore[attr-defined]
    axis.set_ylabel("throughput / upstream", fontsize=8)  # type: ignore[attr-defined]
    axis.spines[["top", "right"]].set_visible(False)  # type: ignore[attr-defined]
