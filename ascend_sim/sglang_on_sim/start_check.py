"""SGLang plugin: a scheduler that did not really take the NPU path ends with one sentence.

SGLang falls back quietly: to another attention backend, or to an implementation by transformers when its
own model class cannot be imported. Tests on such a server would show nothing about the NPU path.
"""

from __future__ import annotations

from typing import Any

EXPECTED_ATTENTION = "sglang.srt.hardware_backend.npu.attention.ascend_backend.AscendAttnBackend"
NATIVE_MODELS = "sglang.srt.models."
REPORT = "simulated Ascend:"


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.init_model_worker", check, HookType.AFTER)


def check(_result: None, scheduler: Any) -> None:
    """End this scheduler unless everything is as expected; say in the log what is in use."""
    from sglang.srt.platforms import current_platform

    runner = scheduler.tp_worker.model_runner
    backend, model = full_name(runner.attn_backend), full_name(runner.model)
    in_use = f"platform {current_platform.device_name}, attention {backend}, model {model}"
    parameter = next(runner.model.parameters())
    problem = None
    if current_platform.device_name != "npu" or parameter.device.type != "npu":
        problem = f"SGLang did not take the npu platform; its weights are on {parameter.device}"
    elif backend != EXPECTED_ATTENTION:
        problem = f"SGLang did not take {EXPECTED_ATTENTION}"
    elif not model.startswith(NATIVE_MODELS) or "transformers" in model.lower():
        problem = "SGLang fell back from its native model class"
    if problem:
        raise SystemExit(f"{REPORT} {problem} ({in_use})")
    print(f"{REPORT} {in_use}", flush=True)


def full_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
