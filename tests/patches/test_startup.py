"""The start of a scheduler: which port it takes, and that all ranks decide the same about their lanes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rig.harness import Here, Team
from sglang_npu_pp.errors import SettingsError, TransportError
from sglang_npu_pp.patches import startup

WORLD = 4  # ranks of one replica


@pytest.fixture(autouse=True)
def last_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: WORLD - 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: WORLD)


def port_of(first: int, *, dp_size: int = 1, dp_rank: int | None = None, attn_dp_size: int = 1) -> int:
    scheduler = SimpleNamespace(server_args=SimpleNamespace(dp_size=dp_size))
    parallel = SimpleNamespace(dp_rank=dp_rank, attn_dp_size=attn_dp_size, pp_rank=1, tp_rank=1)
    return startup._own_port(scheduler, parallel, first)


def test_ports_are_counted_on_over_replicas() -> None:
    assert port_of(0) == 0
    assert port_of(5000) == 5003
    assert [port_of(5000, dp_size=2, dp_rank=replica) for replica in range(2)] == [5003, 5007]
    assert port_of(5000, dp_size=2, dp_rank=1, attn_dp_size=2) == 5003  # one world
    assert port_of(5000, dp_rank=1) == 5003  # a server of its own, which SGLANG_DP_RANK numbers


def test_a_range_that_is_not_there_is_refused() -> None:
    assert port_of(65528, dp_size=2, dp_rank=1) == 65535
    for replica in range(2):  # all end, and none waits for another
        with pytest.raises(SettingsError, match="SGLANG_NPU_PP_PORT=65529 leaves no port for each rank"):
            port_of(65529, dp_size=2, dp_rank=replica)


@pytest.mark.parametrize(
    ("config", "indices"),
    [
        ({}, 0),
        ({"index_topk": 2048}, 0),  # each layer has its own
        ({"index_topk": 2048, "index_topk_freq": 4}, 2048),
        ({"index_topk": 2048, "index_topk_pattern": "FSSS"}, 2048),
        ({"index_topk": 2048, "index_topk_freq": None, "cli_factor": 2}, 2048),
    ],
)
def test_slots_have_room_for_the_indices_that_layers_share(config: dict[str, object], indices: int) -> None:
    model = SimpleNamespace(hidden_size=64, dtype=torch.bfloat16, hf_text_config=SimpleNamespace(**config))
    arguments = SimpleNamespace(chunked_prefill_size=1024)
    scheduler = SimpleNamespace(server_args=arguments, model_config=model)
    reserved = startup._slot_bytes(scheduler, SimpleNamespace(attn_tp_size=2))
    assert reserved == 2 * 1024 * 64 * 2 // 2 + 1024 * indices * 4


def judged(here: Here, sentences: list[str | None]) -> str:
    said = sentences[here.index]
    failure = None if said is None else TransportError(said)
    return str(startup.failure_of_any_rank(failure, f"stage {here.index} rank 0", 20))


def test_a_lane_that_one_rank_cannot_open_is_opened_by_none(team: Team) -> None:
    first, second, third = team.each(judged, [None, "it cannot.", None])
    assert second == "it cannot."
    for stage, sentence in ((0, first), (2, third)):
        assert sentence.startswith(f"stage {stage} rank 0: not all ranks could open their host lane. ")
        assert "the host lane is 'open' on rank 0, 2 but 'it cannot.' on rank 1" in sentence
