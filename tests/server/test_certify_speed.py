"""SGLang's load generator against a real server, without a network."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import psutil
import pytest

from rig.launcher import Launcher
from sglang_npu_pp.tools.certify import resources, speed
from sglang_npu_pp.tools.certify.results import Side
from sglang_npu_pp.tools.certify.speed import Load, Served

pytestmark = pytest.mark.release
LOAD = Load(input_tokens=32, output_tokens=8, prompts=8, concurrency=4)


def test_the_load_generator_of_the_installed_sglang(make_launcher: Callable[[str], Launcher]) -> None:
    launcher = make_launcher("certify_speed")
    server = launcher.start(1, 1, patched=False)
    try:
        environ = {**os.environ, **server.environment, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}
        found = speed.measure(LOAD, Served(server.url, str(server.model), environ=environ), Side.UNPATCHED, 1)
        processes = [psutil.Process(pid) for pid in server.scheduler_pids()]
        used = resources.measure(processes, Side.UNPATCHED, 1, window_s=0.5)
    finally:
        launcher.stop_all()
    assert found.completed == LOAD.prompts
    assert found.output_tokens_per_s == pytest.approx(found.requests_per_s * LOAD.output_tokens)
    assert found.total_tokens_per_s == pytest.approx(found.requests_per_s * (32 + 8))
    assert all(0 < each.median <= each.p99 for each in (found.ttft_ms, found.tpot_ms, found.itl_ms))
    assert used.memory_mb > 50
    assert math.isfinite(used.idle_cpu)
