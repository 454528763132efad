"""Python imports this by itself, first of all, in every process that has this directory on PYTHONPATH.

It only hangs up hooks that act when torch_npu is imported; a process that never imports torch pays nothing.
"""

import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[3]

sys.path.append(str(REPOSITORY))  # behind everything else: only `ascend_sim` is wanted from there

from ascend_sim.sglang_on_sim import import_hooks  # noqa: E402

import_hooks.install()
