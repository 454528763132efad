"""The SGLang plugin of this folder: loads the probes that PP_PROBES names, with commas, and no others.

SGLang loads it in every process of a server and only logs an exception of a plugin. A probe that is not there
ends the process: what a test or benchmark would see without it is nothing.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

VARIABLE = "PP_PROBES"


def register() -> None:
    """Entry point `sglang.srt.plugins`."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if not names:
        raise SystemExit(f"{VARIABLE} names no probe; {_known()}")
    for name in names:
        try:
            load = importlib.import_module(name).register
        except (ImportError, AttributeError) as error:
            raise SystemExit(f"{VARIABLE}: {name!r} is no probe ({error}); {_known()}") from error
        load()


def _known() -> str:
    here = Path(__file__).parent
    return f"in {here} there are {', '.join(sorted(path.stem for path in here.glob('*_probe.py')))}."
