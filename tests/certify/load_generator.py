"""In the place of `sglang.bench_serving`: what a load generator may do, and how a test makes it do so."""

from __future__ import annotations

import os
from pathlib import Path

RECORDED = Path(__file__).with_name("recorded_bench_serving.jsonl")
"""A line that the load generator of SGLang 0.5.21 wrote here, for 8 requests of 32 tokens, 8 to generate
each, to a random model on a CPU; without server_info and generated_texts."""

WRITES = f"""
import json, os, pathlib, sys
options = sys.argv[1:]
output = options[options.index("--output-file") + 1]
pathlib.Path(output).write_text(pathlib.Path({str(RECORDED)!r}).read_text())
names = "SGLANG_NPU_PP", "HF_HUB_OFFLINE", "OPENAI_API_KEY", "NO_PROXY"
seen = {{name: os.environ.get(name) for name in names}}
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps({{"options": options, "environ": seen}}))
"""
WRITES_NOTHING = "print('bye')"
FAILS = "print('Traceback'); raise SystemExit('KeyError: no such model')"
HANGS = "import threading; print('waiting', flush=True); threading.Event().wait()"


def environ(folder: Path, program: str) -> dict[str, str]:
    """Variables with which `python -m sglang.bench_serving` is this program."""
    package = folder / "sglang"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "bench_serving.py").write_text(program)
    return {**os.environ, "PYTHONPATH": str(folder), "SEEN": str(folder / "seen.json")}
