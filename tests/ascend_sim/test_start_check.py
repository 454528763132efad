"""The check at the start of a scheduler, on schedulers that took other paths."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ascend_sim.sglang_on_sim.start_check import EXPECTED_ATTENTION, check

NATIVE = "sglang.srt.models.qwen3_vl.Qwen3VLForConditionalGeneration"
FALLBACK = "sglang.srt.models.transformers.TransformersForCausalLM"


def instance_of(full_name: str, **attributes: Any) -> Any:
    module, _, name = full_name.rpartition(".")
    return type(name, (SimpleNamespace,), {"__module__": module})(**attributes)


def scheduler(model: str = NATIVE, attention: str = EXPECTED_ATTENTION, weights: str = "npu") -> Any:
    parameter = SimpleNamespace(device=SimpleNamespace(type=weights))
    runner = SimpleNamespace(
        model=instance_of(model, parameters=lambda: iter([parameter])), attn_backend=instance_of(attention)
    )
    return SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))


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
        f"simulated Ascend: platform npu, attention {EXPECTED_ATTENTION}, model {NATIVE}\n"
    )


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
