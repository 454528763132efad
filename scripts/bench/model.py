"""The models that the benchmarks serve: Qwen3-VL with random weights, made when they are needed first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .competitors import ROOT

_LIMIT_S = 300.0


def for_cpu() -> Path:
    """Its forwards take some ms, and those of a chunk of 256 tokens less than 30, in float32: paddings are
    in force.

    Few layers: on one core SGLang attends request by request, which takes longest. One is a deepstack layer.
    """
    return _model(layers=4, width=384)


def for_simulated_ascend(pp: int) -> Path:
    """One layer a stage. The simulator takes several times as long to launch a layer as a host of an Ascend
    does, where most forwards are one launch of a graph; forwards get their time from the benchmark."""
    return _model(layers=pp, width=128)


def _model(layers: int, width: int) -> Path:
    """Where it is: in .run, which git ignores. The shape is in the name: another one is another model."""
    name = f"bench_model_{layers}x{width}"
    directory = ROOT / ".run" / name
    if not (directory / "config.json").is_file():
        directory.parent.mkdir(exist_ok=True)
        partial = directory.with_name(f"{name}-{os.getpid()}")
        build = [sys.executable, str(ROOT / "scripts/model/random_model.py"), "--out", str(partial)]
        build += ["--layers", str(layers), "--width", str(width), "--deepstack", "0"]
        done = subprocess.run(build, capture_output=True, text=True, timeout=_LIMIT_S)
        if done.returncode:
            raise OSError(f"the model cannot be built: {done.stderr.strip().splitlines()[-1:]}")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    return directory
