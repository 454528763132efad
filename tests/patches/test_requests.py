"""How later stages receive the requests of an iteration, as far as upstream's own accounts show it; and how a
stage of four ranks, attention tp 2 and cp 2, shares what the stages of a disaggregated server agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.observability.scheduler_stage_metrics import SchedulerStageMetricsRecorder

from rig.harness import Here, Team, results
from sglang_npu_pp.patches import requests as requests_seam
from sglang_npu_pp.patches.intake import Intake
from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.patches.requests import recv_requests

from .coordinators import gloo_coordinator


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
        link=SimpleNamespace(stage=stage),
        begin_iteration=lambda: None,
        receive_requests=look,
        intake=Intake(),
    )
    set_current(pipeline)
    receiver = SimpleNamespace(scheduler_stage_metrics=recorder, input_blocker=None)
    assert recv_requests(look, receiver) == ["requests"]
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


# --- in a process for each rank of a stage -------------------------------------------------------------


def receive_consensus(here: Here, rank: int, messages: Sequence[list[str]]) -> list[list[str]]:
    """What this rank has in the end. Only the leader gets the messages of the previous stage."""
    scheduler = SimpleNamespace(
        attn_tp_group=gloo_coordinator("tp", [[0, 1], [2, 3]]),
        attn_cp_group=gloo_coordinator("cp", [[0, 2], [1, 3]]),
    )
    arriving = iter(messages)
    pending = SimpleNamespace(wait_values=lambda: next(arriving))
    pipeline: Any = SimpleNamespace(link=SimpleNamespace(stage=1, stages=2, post=lambda kind, stage: pending))
    set_current(pipeline)
    requests_seam.is_leader = lambda: rank == 0
    return [requests_seam.recv_from_previous_stage(None, scheduler) for _ in messages]


@pytest.mark.slow
def test_every_rank_of_a_stage_gets_the_consensus() -> None:
    """Of attention tp 2 and cp 2: no group has them all."""
    team = Team(4, process_group=True, environment={"SGLANG_USE_CPU_ENGINE": "1"})
    messages: list[list[str]] = [["one", "another"], []]
    try:
        calls = [rank.start(receive_consensus, rank.index, messages) for rank in team.ranks]
        assert results(calls, limit_s=120) == [messages] * 4
    finally:
        team.close()
