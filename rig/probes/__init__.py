"""Probes: what tests and benchmarks let SGLang load into a server, patched or not, to watch or to disturb it.

This folder goes on the PYTHONPATH of the server's processes, where its modules are imported by their bare
names; with it comes one entry point for SGLang's plugins, `load_probes.py`, which loads the probes that
PP_PROBES names. A probe is a module with a function `register`: those here are called `*_probe`, and one that
lies elsewhere is named in full, with the folder that it is imported from among `paths`.

sglang_pp_probe    for tests: counts, faults, phases, clocks, states, as further variables say (PP_PROBE_...)
ahead_probe        takes back every decode that is prepared ahead, and compares what is left
kv_probe           a disaggregated server on CPU, and its transfers
storage_probe      holds back the storage of a hierarchical cache
nextn_probe        what drafts with a NEXTN layer lack on CPU
dspark_probe       what a DSPARK draft keeps of each prompt
layouts_probe      what SGLang has for accelerators only, on CPU; and the prefills of each scheduler
dp_metadata_probe  how long the metadata of data-parallel attention block a scheduler
host_time_probe    what an iteration of the PP loop costs the host
host_picture_probe where the host's time goes between an arrival and the next forward
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .load_probes import VARIABLE

FOLDER = Path(__file__).parent


def probe_variables(*names: str, paths: Sequence[Path | str] = ()) -> dict[str, str]:
    """Variables of a server that loads these probes; `paths` go on its PYTHONPATH, too, behind the folder."""
    return {VARIABLE: ",".join(names), "PYTHONPATH": os.pathsep.join(map(str, [FOLDER, *paths]))}
