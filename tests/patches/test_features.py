"""A server that uses a feature which is not known on this SGLang is refused, or left to upstream."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch.distributed as dist
from sglang.srt import runtime_context

from sglang_npu_pp.builds import Build, Known
from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.patches import features, load_contracts, pipeline, seams_for, startup

PLAIN = {
    "enable_dp_attention": False,
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "enable_lora": None,
    "enable_hierarchical_cache": False,
    "lora_paths": None,
}


OF_PREFILLS = "sglang.srt.disaggregation.prefill:SchedulerDisaggregationPrefillMixin.send_kv_chunk"
OF_THE_END = "sglang.srt.utils.watchdog:SubprocessWatchdog._check_processes"


def known_but_for(target: str) -> Known:
    contracts, seams = load_contracts(), seams_for(None)
    functions = {target: contracts["0.5.21"].get(target) for seam in seams for target in seam.targets}
    return Known(Build("0.5.99", {**functions, target: "x"}), seams, contracts)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a rank that starts tells the others; on an SGLang whose `send_kv_chunk` is not known."""
    monkeypatch.setattr(features, "_known", known_but_for(OF_PREFILLS))
    monkeypatch.setattr(pipeline, "_left_to_upstream", False)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: None)
    found: list[Any] = []
    monkeypatch.setattr(startup, "agree", lambda store, statement, **options: found.append(statement))
    return found


def start(monkeypatch: pytest.MonkeyPatch, pp_size: int, **arguments: Any) -> None:
    parallel = SimpleNamespace(pp_rank=0, tp_rank=0, pp_size=pp_size)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    server_args = SimpleNamespace(**{**PLAIN, "pp_size": pp_size, **arguments})
    startup._start(SimpleNamespace(server_args=server_args))


@pytest.mark.parametrize("pp_size", [1, 2])
def test_require_refuses_a_server_that_uses_what_is_not_known(
    statements: list[Any], monkeypatch: pytest.MonkeyPatch, pp_size: int
) -> None:
    monkeypatch.setenv("SGLANG_NPU_PP", "require")
    if pp_size == 1:  # which asks bootstrap servers, and has no stages that KV is sent from
        start(monkeypatch, pp_size, disaggregation_mode="prefill")
        return
    with pytest.raises(
        ContractError, match=r"stage 0 rank 0: this SGLang is not known for disaggregation \("
    ):
        start(monkeypatch, pp_size, disaggregation_mode="prefill")
    assert statements == []


def test_auto_leaves_all_of_it_to_upstream_and_all_ranks_agree(
    statements: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start(monkeypatch, 2, disaggregation_mode="prefill")
    (statement,) = statements
    assert statement["path"].startswith("upstream (this SGLang is not known for disaggregation (")
    assert statement["features"] == (
        "core, LoRA, data-parallel attention, bootstrap, speculative decoding, hierarchical cache, "
        "preparing ahead, end of a server"
    )
    assert len(statement["functions"]) == 16
    assert statement["certificate"] == "none"
    assert pipeline.current_or_none() is None
    assert not pipeline.is_ours()
    assert "stays on upstream's path: this SGLang is not known for disaggregation" in caplog.text


def test_a_server_that_does_not_use_it_is_patched(
    statements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_NPU_PP", "require")
    monkeypatch.setattr(startup, "_open_host_lane", lambda *_: None)
    monkeypatch.setattr(startup, "_dp_rank", lambda *_: None)
    start(monkeypatch, 2)
    assert statements[0]["path"] == "asynchronous"


def test_a_server_that_is_patched_without_our_end_says_so(
    statements: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known = known_but_for(OF_THE_END)
    monkeypatch.setattr(features, "_known", known)
    monkeypatch.setattr(startup, "_open_host_lane", lambda *_: None)
    monkeypatch.setattr(startup, "_dp_rank", lambda *_: None)
    start(monkeypatch, 2)
    assert statements[0]["path"] == "asynchronous"
    assert "end of a server" not in statements[0]["features"]
    why = f"end of a server ({OF_THE_END} differs from SGLang 0.5.21)"
    assert f"stage 0 rank 0 is patched in part: this SGLang is not known for {why}" in caplog.text
    assert known.sentence.endswith(f", not for {why}")
    exported = MagicMock()
    monkeypatch.setattr(startup, "Exporter", exported)
    startup._export(MagicMock(), 2, {})
    assert exported.call_args.kwargs["features"] == {name: name != features.END for name in known.features}
    assert exported.return_value.start.called


def test_require_refuses_a_server_without_our_end(
    statements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_NPU_PP", "require")
    monkeypatch.setattr(features, "_known", known_but_for(OF_THE_END))
    with pytest.raises(ContractError, match=r"stage 0 rank 0: this SGLang is not known for end of a server"):
        start(monkeypatch, 2)
    assert statements == []
