"""The report in a folder: report.md, report.json and report.png, to be attached to an issue as they are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ..timeline.states import Timeline
from .markdown import markdown
from .redact import Redactor
from .results import Report

MARKDOWN, JSON, PICTURE = "report.md", "report.json", "report.png"
_NO_MATPLOTLIB = "There is no picture: it needs matplotlib (pip install 'sglang-npu-pp[tools]')."


def write(report: Report, folder: Path, redactor: Redactor, timeline: Timeline | None = None) -> list[Path]:
    """Write the report, redacted; returns the files. `timeline`: of the patched server, for the picture.

    Sets `picture`. Raises OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = redactor.everything(replace(report, picture=""))
    shown = replace(shown, picture=_draw(shown, folder, timeline))
    (folder / MARKDOWN).write_text(markdown(shown))
    (folder / JSON).write_text(json.dumps(as_json(shown), indent=1, ensure_ascii=False) + "\n")
    names = [MARKDOWN, JSON, *([PICTURE] if shown.picture == PICTURE else [])]
    return [folder / name for name in names]


def as_json(report: Report) -> dict[str, Any]:
    """All fields; a number that is none is null."""
    found = _finite(msgspec.to_builtins(report, str_keys=True))
    return {"passed": report.passed, **found}


def _draw(report: Report, folder: Path, timeline: Timeline | None) -> str:
    """The file's name, or why there is none."""
    (folder / PICTURE).unlink(missing_ok=True)  # of an earlier report
    try:
        from .picture import draw

        draw(report, folder / PICTURE, timeline)
    except ImportError:
        return _NO_MATPLOTLIB
    except ValueError as error:
        return str(error)
    return PICTURE


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
