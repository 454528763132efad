"""A probe that holds back the third level of a hierarchical cache (`--hicache-storage-backend file`).

STORAGE_PROBE_GATE names a folder. While there is a file `read1` in it, reads of stage 1 wait, and so on for
`write` and other stages; queries for what is there do not. While there is `broken1`, reads of stage 1
find nothing, as SGLang's storage says when it fails.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

POLL_S = 0.01


def register() -> None:
    if not (folder := os.environ.get("STORAGE_PROBE_GATE")):
        return
    from sglang.srt.mem_cache.hicache_storage import HiCacheFile

    made = HiCacheFile.__init__

    @functools.wraps(made)
    def make(storage: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        made(storage, config, *args, **kwargs)
        for name, gate in (("get", "read"), ("set", "write")):
            path = Path(folder) / f"{gate}{config.pp_rank}"
            setattr(storage, name, held_back(getattr(storage, name), path))
        storage.get = failing(storage.get, Path(folder) / f"broken{config.pp_rank}")

    HiCacheFile.__init__ = make


def held_back(function: Callable[..., Any], gate: Path) -> Callable[..., Any]:
    def wait(*args: Any, **kwargs: Any) -> Any:
        while gate.exists():
            time.sleep(POLL_S)
        return function(*args, **kwargs)

    return wait


def failing(function: Callable[..., Any], gate: Path) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return None if gate.exists() else function(*args, **kwargs)

    return call
