"""Asynchronous pipeline parallelism for SGLang, as a plugin.

import sglang_npu_pp
sglang_npu_pp.activate()     # what SGLang's plugin framework does by itself when this is installed
sglang_npu_pp.counters()     # counters of this rank, once its scheduler has started
"""

from __future__ import annotations

from .observe.telemetry import Telemetry
from .plugin import activate, deactivate, decision
from .version import __version__


def counters() -> Telemetry | None:
    """The counters of this process, None where no scheduler with a pipeline runs."""
    from .patches.pipeline import current_or_none  # imports torch, which `import sglang_npu_pp` does not

    pipeline = current_or_none()
    return None if pipeline is None else pipeline.link.telemetry


__all__ = ["__version__", "activate", "counters", "deactivate", "decision"]
