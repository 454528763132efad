"""A prefill server on two nodes that drafts with a NEXTN layer, and an unpatched decode server behind it.

SGLang's own pair, over Mooncake's TCP, with the tiny twin of DeepSeek-V3. The decode server is beside the
first stage and is the same for each design; what the last stage has of the KV cache crosses the link.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rig import disaggregated, prefill_drafts
from rig.launcher import RANDOM_MODEL, ROOT
from rig.published_twin import write_twin

from .load import SGLang

PREFILL, DECODE = disaggregated.MODES


def twin() -> Path:
    """In .run, which git ignores."""
    folder = ROOT / ".run/bench_prefill_drafts"
    if not (folder / "model/config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_twin(folder / "model", RANDOM_MODEL)
    return folder / "model"


def variables(mode: str) -> Mapping[str, str]:
    """The forwards of prefill servers are counted."""
    return prefill_drafts.environment(*(["scripts.bench.probe"] if mode == PREFILL else []), paths=[ROOT])


class PairDialect(SGLang):
    """Asks the decode server, and tells the prefill server, as a load balancer does."""

    def __init__(self, prefill_url: str, host: str, bootstrap_port: int) -> None:
        self.told = prefill_url + self.path
        self._bootstrap = {"bootstrap_host": host, "bootstrap_port": bootstrap_port}
        self._rooms = itertools.count(1)

    def body(self, prompt: list[int], length: int) -> dict[str, Any]:
        return {**super().body(prompt, length), **self._bootstrap, "bootstrap_room": next(self._rooms)}
