"""The model that the benchmark serves: a Qwen3-VL with random weights, wide enough to take a few ms."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .competitors import ROOT

# Few layers: on one core SGLang attends request by request, which takes longest. One is a deepstack layer.
_SHAPE = ("--layers", "4", "--width", "512", "--deepstack", "0")
_LIMIT_S = 300.0


def model_directory() -> Path:
    """Where it is; built on the first call (about 20 MB in .run, which git ignores)."""
    directory = ROOT / ".run" / "bench_model"
    if not (directory / "config.json").is_file():
        directory.parent.mkdir(exist_ok=True)
        partial = directory.with_name(f"bench_model-{os.getpid()}")
        build = [sys.executable, str(ROOT / "scripts/model/build.py"), "--out", str(partial), *_SHAPE]
        done = subprocess.run(build, capture_output=True, text=True, timeout=_LIMIT_S)
        if done.returncode:
            raise OSError(f"the model cannot be built: {done.stderr.strip().splitlines()[-1:]}")
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    return directory
