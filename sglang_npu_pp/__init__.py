"""Asynchronous pipeline parallelism for SGLang, as a plugin.

import sglang_npu_pp
sglang_npu_pp.activate()     # what SGLang's plugin framework does by itself when this is installed
sglang_npu_pp.counters()     # counters of this rank, once its scheduler has started
"""

from __future__ import annotations

import importlib

from .observe.telemetry import Telemetry
from .plugin import activate, deactivate, decision

__version__ = "0.1.0"


def counters() -> Telemetry | None:
    """The counters of this process, None where no scheduler with a pipeline runs."""
    pipeline = importlib.import_module("sglang_npu_pp.patches.pipeline").current()
    return None if pipeline is None else pipeline.link.telemetry


__all__ = ["__version__", "activate", "counters", "deactivate", "decision"]
