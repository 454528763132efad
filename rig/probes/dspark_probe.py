"""What a prefill server's DSPARK draft keeps of each prompt: a digest of the keys and values that it writes.

One line for each forward of the last stage goes to `<pid>.kept` in PP_PROBE_DIR: its first position, its
tokens, the digest. With PP_PROBE_FAULT_FILE (sglang_pp_faults.py) there is one fault more, STATES_BEFORE.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATES_BEFORE = "draft reads hidden states of the forward before"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = Path(os.environ["PP_PROBE_DIR"]) / f"{os.getpid()}.kept"

    spoil = _spoiler()

    def write(original: Any, draft: Any, **options: Any) -> None:
        options["target_hidden"] = spoil(options["target_hidden"])
        original(draft, **options)
        pool, positions, places = options["pool"], options["positions"], options["cache_loc"]
        digest = hashlib.sha256()
        for layer in range(pool.start_layer, pool.start_layer + pool.layer_num):
            for buffer in pool.get_kv_buffer(layer):
                digest.update(buffer.flatten(0, -3)[places].cpu().numpy().tobytes())
        with path.open("a") as file:
            file.write(f"{int(positions[0])} {len(positions)} {digest.hexdigest()}\n")

    HookRegistry.register(
        "sglang.srt.models.dspark.DSparkDraftMixin.write_target_hidden_kv", write, HookType.AROUND
    )


def _spoiler() -> Callable[[Any], Any]:
    """What the draft gets in the place of hidden states."""
    path = os.environ.get("PP_PROBE_FAULT_FILE")
    if path is None:
        return lambda states: states
    from sglang_pp_faults import Planted  # by its bare name, as the server loads it
    from sglang_pp_feature_faults import stale

    planted, before = Planted(Path(path)), [None]

    def spoil(states: Any) -> Any:
        earlier, before[0] = before[0], states.clone()
        if planted.fault() != STATES_BEFORE or earlier is None:
            return states
        planted.note()
        return stale(states, earlier)

    return spoil
