"""The optional competitor, which is not installed for tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from rig.server import ServerError
from scripts.bench.vllm import VllmServer

ROOT = Path(__file__).parents[2]


@pytest.mark.server
@pytest.mark.thorough
def test_it_is_named_when_it_ends(tmp_path: Path) -> None:
    server = VllmServer(ROOT / "sglang_npu_pp/tools/certify/model", 1, 2, log=tmp_path / "log", nnodes=2)
    with pytest.raises(ServerError, match=r"vLLM of node [01] ended with exit code 1 while it was starting"):
        server.__enter__()
