"""The few places where a patch does not look alike in all releases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.distributed import parallel_state
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_npu_pp.patches import forwards, proxies, requests, startup


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Schedulers whose pipeline was started."""
    found: list[Any] = []
    monkeypatch.setattr(startup, "_start", found.append)
    return found


def process_groups(monkeypatch: pytest.MonkeyPatch, exist: bool) -> None:
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: exist)


def test_the_start_waits_for_process_groups_that_the_model_runner_makes(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    process_groups(monkeypatch, False)
    startup.init_idle_sleeper(lambda scheduler: None, "scheduler")
    assert started == []
    assert startup.init_torch_distributed(lambda runner: 12.5, "model runner") == 12.5
    assert startup.init_torch_distributed(lambda runner: 12.5, "draft model's runner") == 12.5
    assert started == ["scheduler"]


def test_the_start_is_at_once_where_the_process_groups_exist(
    started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    process_groups(monkeypatch, True)
    startup.init_idle_sleeper(lambda scheduler: None, "scheduler")
    assert started == ["scheduler"]


@pytest.mark.parametrize(
    ("scheduler", "group"),
    [
        (SimpleNamespace(attn_tp_group="group"), "group"),
        (SimpleNamespace(attn_tp_group="group", require_attn_tp_allgather=True), "group"),
        (SimpleNamespace(attn_tp_group="group", require_attn_tp_allgather=False), None),
    ],
)
def test_proxies_are_gathered_where_ranks_hold_equal_ones(scheduler: Any, group: str | None) -> None:
    assert proxies._gather_group(scheduler) == group


def test_consensus_is_broadcast_in_every_group_of_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(data: Any, rank: int, cpu_group: str, src: int) -> Any:
        return [*data, (cpu_group, rank, src)]

    monkeypatch.setattr("sglang.srt.utils.broadcast_pyobj", broadcast)
    scheduler = SimpleNamespace(
        attn_tp_group=SimpleNamespace(world_size=2, rank=3, cpu_group="tp", ranks=[2, 3]),
        attn_cp_group=SimpleNamespace(world_size=1, rank=3, cpu_group="cp", ranks=[3]),
    )
    assert requests._broadcast_inside_stage(scheduler, ["rid"]) == ["rid", ("tp", 3, 2)]


def test_a_forward_batch_is_made_as_a_launch_makes_it_whatever_wraps_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another plugin's wrapper says nothing of the arguments that the function takes."""
    monkeypatch.setattr(ForwardBatch, "init_new", lambda *arguments, **options: None)
    name = "return_hidden_states_before_norm"
    assert forwards.options_of_a_launch() == {name: False}
    monkeypatch.setattr(ScheduleBatch, name, False, raising=False)  # up to 0.5.15.post1
    assert forwards.options_of_a_launch() == {}
