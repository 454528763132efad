"""What a prefill server's DSPARK draft keeps of each prompt: a digest of the keys and values that it writes.

One line for each forward of the last stage goes to `<pid>.kept` in PP_PROBE_DIR: its first position, its
tokens, the digest.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    path = Path(os.environ["PP_PROBE_DIR"]) / f"{os.getpid()}.kept"

    def write(original: Any, draft: Any, **options: Any) -> None:
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
