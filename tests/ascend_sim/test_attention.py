"""npu_fused_infer_attention_score, the operator of captured graphs, against PyTorch's attention.

One process runs all scenarios of `attention_scenarios`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from ascend_sim.build import REPOSITORY
from ascend_sim.environment import environment

from . import attention_scenarios as scenarios

pytestmark = pytest.mark.thorough

LIMIT_S = 60.0
CLOSE = pytest.approx(0, abs=1e-6)

SCENARIOS = (
    scenarios.paged,
    scenarios.into_given_memory,
    scenarios.lengths_are_read_at_the_call,
    scenarios.vision_tower,
    scenarios.refusals,
)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What every scenario returned."""
    command = [sys.executable, "-m", scenarios.__name__, *(scenario.__name__ for scenario in SCENARIOS)]
    ended = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment(devices=1, poison=1)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert ended.returncode == 0, f"exit code {ended.returncode}\n{ended.stderr[-4000:]}"
    results: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return results


def test_attention_over_pages(seen: dict[str, Any]) -> None:
    assert seen["paged"] == {"BSH": CLOSE, "BSND": CLOSE}


def test_it_is_one_task_that_uses_its_workspace(seen: dict[str, Any]) -> None:
    found = seen["into_given_memory"]
    assert found == {"distance": CLOSE, "workspace was used": True, "tasks": [scenarios.TASK]}


def test_lengths_are_read_at_the_call(seen: dict[str, Any]) -> None:
    assert seen["lengths_are_read_at_the_call"] == CLOSE


def test_attention_of_the_vision_tower(seen: dict[str, Any]) -> None:
    assert seen["vision_tower"] == CLOSE


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("layout", "layout BNSD and a block table"),
        ("no pages", "layout BSH without a block table"),
        ("mask", "atten_mask"),
        ("sparse mode", "sparse_mode"),
        ("too few lengths", "another number of lengths"),
        ("too long", "a length beyond the block table"),
        ("block size", "a block_size that is not that of the cache"),
    ],
)
def test_what_it_does_not_compute_is_refused(seen: dict[str, Any], change: str, named: str) -> None:
    said = seen["refusals"][change]
    assert named in said
    assert said.endswith("on the simulated Ascend")
