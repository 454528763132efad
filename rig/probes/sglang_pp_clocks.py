"""For tests: ranks whose clocks are apart.

The file "clocks" in PP_PROBE_DIR says by how many seconds the clocks of "leaders" are ahead (the first ranks
of stage 0), and those of "others", as a JSON object. Only for what a scheduler decides by a clock: the lanes,
and everything else, keep the real one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

DECIDE_BY_CLOCK = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.scheduler_components.flush_wrapper",
    "sglang.srt.session.session_controller",
    "sglang.srt.lora.lora_drainer",
    "sglang.srt.observability.req_time_stats",
    "sglang_npu_pp.patches.decisions",
    "sglang_npu_pp.patches.time_limits",
)


class AheadClock:
    """Stands for the module `time`."""

    def __init__(self, path: Path, whose: str) -> None:
        self._path, self._whose = path, whose

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead()

    def perf_counter(self) -> float:
        return time.perf_counter() + self._ahead()

    def _ahead(self) -> float:
        try:
            return float(json.loads(self._path.read_text()).get(self._whose, 0))
        except FileNotFoundError:
            return 0.0


def set_apart(path: Path) -> None:
    """From the beginning of the event loop of this process on."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def begin(_result: None, _scheduler: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        first = parallel.pp_rank == 0 and parallel.attn_tp_rank == 0 and parallel.attn_cp_rank == 0
        clock = AheadClock(path, "leaders" if first else "others")
        for name in DECIDE_BY_CLOCK:
            if name in sys.modules:
                sys.modules[name].time = clock  # type: ignore[attr-defined]

    mixin = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
    HookRegistry.register(f"{mixin}.init_pp_loop_state", begin, HookType.AFTER)
