"""Asynchronous pipeline parallelism for SGLang, as a plugin.

import sglang_npu_pp
sglang_npu_pp.activate()     # by hand; SGLang's plugin framework does it by itself
sglang_npu_pp.counters()     # telemetry of this rank, once its scheduler has started
"""

from __future__ import annotations

from .observe.telemetry import Telemetry
from .plugin import activate, deactivate, decision
from .version import __version__


def counters() -> Telemetry | None:
    """Telemetry of this process; None without a pipeline."""
    from .patches.pipeline import current_or_none  # imports torch, which `import sglang_npu_pp` does not

    pipeline = current_or_none()
    return None if pipeline is None else pipeline.link.telemetry


__all__ = ["__version__", "activate", "counters", "deactivate", "decision"]
