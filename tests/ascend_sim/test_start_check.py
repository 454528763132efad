"""The check at the start of a scheduler, on schedulers that took other paths."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ascend_sim.sglang_on_sim import start_check
from ascend_sim.sglang_on_sim.start_check import (
    EXPECTED_ATTENTION,
    EXPECTED_GRAPHS,
    REPLAYS,
    check,
    check_forward,
)

NATIVE = "sglang.srt.models.qwen3_vl.Qwen3VLForConditionalGeneration"
FALLBACK = "sglang.srt.models.transformers.TransformersForCausalLM"


def instance_of(full_name: str, **attributes: Any) -> Any:
    module, _, name = full_name.rpartition(".")
    return type(name, (SimpleNamespace,), {"__module__": module})(**attributes)


def scheduler(
    model: str = NATIVE,
    attention: str = EXPECTED_ATTENTION,
    weights: str = "npu",
    graphs: Any = None,
    eager: bool = True,
) -> Any:
    parameter = SimpleNamespace(device=SimpleNamespace(type=weights))
    runner = SimpleNamespace(
        model=instance_of(model, parameters=lambda: iter([parameter])),
        attn_backend=instance_of(attention),
        decode_cuda_graph_runner=graphs,
    )
    return SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner), server_args=SimpleNamespace(disable_cuda_graph=eager)
    )


def captured(*sizes: int, votes: bool = False) -> Any:
    """`votes`: with data-parallel attention."""
    return instance_of(EXPECTED_GRAPHS, capture_bs=list(sizes), require_mlp_sync=votes)


def decode_of(size: int, mode: str = "decode", voted: bool = False) -> Any:
    return SimpleNamespace(
        batch_size=size,
        forward_mode=SimpleNamespace(is_decode=lambda: mode == "decode"),
        can_run_decode_cuda_graph=voted,
    )


@pytest.fixture(autouse=True)
def platforms(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """SGLang's module, with the NPU platform."""
    module = ModuleType("sglang.srt.platforms")
    module.current_platform = SimpleNamespace(device_name="npu")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang.srt.platforms", module)
    return module


def test_the_npu_path_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    check(None, scheduler())
    assert capsys.readouterr().out == (
        f"simulated Ascend: platform npu, attention {EXPECTED_ATTENTION}, model {NATIVE}, decode no graphs\n"
    )
    check(None, scheduler(graphs=captured(4, 1, 2), eager=False))
    assert capsys.readouterr().out.endswith(", decode graphs of 1, 2, 4 requests\n")


def test_a_release_without_a_platform_for_npus_takes_the_npu_path(
    platforms: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """And with one runner for all graphs, as 0.5.13.post1."""
    platforms.current_platform = SimpleNamespace(device_name="unknown")  # type: ignore[attr-defined]
    earlier = scheduler(eager=False)
    runner = earlier.tp_worker.model_runner
    del runner.decode_cuda_graph_runner
    runner.graph_runner = captured(1, 2)
    check(None, earlier)
    assert capsys.readouterr().out.endswith(", decode graphs of 1, 2 requests\n")
    with pytest.raises(SystemExit, match="ran without the graph of 2"):
        check_forward(SimpleNamespace(can_run_graph=False), runner, decode_of(2))
    with pytest.raises(SystemExit, match="its weights are on"):
        check(None, scheduler(weights="cpu"))


def test_another_platform_ends_the_start(platforms: ModuleType) -> None:
    platforms.current_platform = SimpleNamespace(device_name="cpu")  # type: ignore[attr-defined]
    with pytest.raises(SystemExit, match="did not take the npu platform"):
        check(None, scheduler())


def test_weights_on_the_host_end_the_start() -> None:
    with pytest.raises(SystemExit, match="its weights are on"):
        check(None, scheduler(weights="cpu"))


def test_another_attention_backend_ends_the_start() -> None:
    with pytest.raises(SystemExit, match="did not take sglang.*AscendAttnBackend"):
        check(None, scheduler(attention="sglang.srt.layers.attention.torch_native.TorchNative"))


def test_a_fallback_model_ends_the_start() -> None:
    with pytest.raises(SystemExit, match="fell back from its native model class"):
        check(None, scheduler(model=FALLBACK))


def test_decode_without_graphs_that_were_asked_for_ends_the_start() -> None:
    with pytest.raises(SystemExit, match="captured no graphs for decode"):
        check(None, scheduler(eager=False))


def test_a_replay_is_said_once_for_each_graph(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start_check, "_replayed", set())
    runner = scheduler(graphs=captured(1, 2, 4)).tp_worker.model_runner
    for size in (3, 4, 1, 3):
        check_forward(SimpleNamespace(can_run_graph=True), runner, decode_of(size))
    assert capsys.readouterr().out == f"{REPLAYS} 4\n{REPLAYS} 1\n"


def test_a_decode_that_leaves_its_graph_out_ends_the_scheduler() -> None:
    runner = scheduler(graphs=captured(1, 2, 4)).tp_worker.model_runner
    eager = SimpleNamespace(can_run_graph=False)
    with pytest.raises(SystemExit, match="a decode batch of 3 requests ran without the graph of 4"):
        check_forward(eager, runner, decode_of(3))
    check_forward(eager, runner, decode_of(5))
    check_forward(eager, runner, decode_of(3, "extend"))
    check_forward(eager, scheduler().tp_worker.model_runner, decode_of(3))


def test_a_decode_beside_another_ranks_prefill_needs_no_graph() -> None:
    runner = scheduler(graphs=captured(1, 2, 4, votes=True)).tp_worker.model_runner
    eager = SimpleNamespace(can_run_graph=False)
    check_forward(eager, runner, decode_of(3, voted=False))
    with pytest.raises(SystemExit, match="ran without the graph of 4"):
        check_forward(eager, runner, decode_of(3, voted=True))
