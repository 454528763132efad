"""How later stages receive the requests of an iteration, as far as upstream's own accounts show it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.observability.scheduler_stage_metrics import SchedulerStageMetricsRecorder

from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.patches.requests import recv_requests


@pytest.fixture(autouse=True)
def no_pipeline_afterwards() -> Iterator[None]:
    yield
    set_current(None)


def receive(stage: int, recorder: SchedulerStageMetricsRecorder | None) -> list[str]:
    """What upstream's accounts say at each step."""
    seen: list[str] = []

    def look(*_: Any, **__: Any) -> list[str]:
        seen.append("-" if recorder is None else recorder._current_stage)
        return ["requests"]

    pipeline: Any = SimpleNamespace(
        link=SimpleNamespace(stage=stage), begin_iteration=lambda: None, receive_requests=look
    )
    set_current(pipeline)
    assert recv_requests(look, SimpleNamespace(scheduler_stage_metrics=recorder)) == ["requests"]
    return seen


def test_a_later_stage_accounts_for_the_wait_as_upstream_does() -> None:
    recorder = SchedulerStageMetricsRecorder(enabled=True)
    recorder.start(0)
    assert receive(1, recorder) == ["recv_requests"]
    assert recorder._current_stage == "other"
    assert recorder.drain(recorder._last_wall_ns or 0)["recv_requests"] > 0


def test_the_first_stage_calls_upstreams_function_which_accounts_for_itself() -> None:
    recorder = SchedulerStageMetricsRecorder(enabled=True)
    recorder.start(0)
    assert receive(0, recorder) == ["other"]


def test_without_metrics_it_is_received_as_well() -> None:
    assert receive(1, None) == ["-"]


def test_profiles_show_it_by_upstreams_name() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        receive(1, None)
    assert "scheduler.recv_requests" in {event.name for event in profile.events()}
