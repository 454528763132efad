"""SGLang plugin: a scheduler that did not really take the NPU path ends with one sentence.

SGLang falls back quietly: to another attention backend, or to an implementation by transformers when its
own model class cannot be imported. Tests on such a server would show nothing about the NPU path.
"""

from __future__ import annotations

from typing import Any

EXPECTED_ATTENTION = "sglang.srt.hardware_backend.npu.attention.ascend_backend.AscendAttnBackend"
EXPECTED_GRAPHS = "sglang.srt.hardware_backend.npu.graph_runner.npu_graph_runner.NPUGraphRunner"
NO_PLATFORM = "unknown"  # of releases that have none for NPUs: their weights and attention tell
NATIVE_MODELS = "sglang.srt.models."
REPORT = "simulated Ascend:"
REPLAYS = f"{REPORT} decode has replayed the graph of"  # and its number of requests; said once for each

_replayed: set[int] = set()  # by this scheduler


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.init_model_worker", check, HookType.AFTER)
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.forward", check_forward, HookType.AFTER
    )


def check(_result: None, scheduler: Any) -> None:
    """End this scheduler unless everything is as expected; say in the log what is in use."""
    from sglang.srt.platforms import current_platform

    runner = scheduler.tp_worker.model_runner
    backend, model = full_name(runner.attn_backend), full_name(runner.model)
    sizes = graph_sizes(runner)
    decode = f"graphs of {', '.join(map(str, sizes))} requests" if sizes else "no graphs"
    in_use = f"platform {current_platform.device_name}, attention {backend}, model {model}, decode {decode}"
    parameter = next(runner.model.parameters())
    problem = None
    if current_platform.device_name not in ("npu", NO_PLATFORM) or parameter.device.type != "npu":
        problem = f"SGLang did not take the npu platform; its weights are on {parameter.device}"
    elif backend != EXPECTED_ATTENTION:
        problem = f"SGLang did not take {EXPECTED_ATTENTION}"
    elif not model.startswith(NATIVE_MODELS) or "transformers" in model.lower():
        problem = "SGLang fell back from its native model class"
    elif not sizes and not scheduler.server_args.disable_cuda_graph:
        problem = "SGLang captured no graphs for decode, and --disable-cuda-graph was not given"
    if problem:
        raise SystemExit(f"{REPORT} {problem} ({in_use})")
    print(f"{REPORT} {in_use}", flush=True)


def check_forward(output: Any, runner: Any, batch: Any, *_arguments: object, **_options: object) -> None:
    """End this scheduler if a decode batch that fits a captured graph did not replay it; say the first time
    that a graph was."""
    fitting = [size for size in graph_sizes(runner) if size >= batch.batch_size]
    if not fitting or not batch.forward_mode.is_decode() or was_outvoted(runner, batch):
        return
    if not output.can_run_graph:
        raise SystemExit(
            f"{REPORT} a decode batch of {batch.batch_size} requests ran without the graph of {fitting[0]}"
        )
    if fitting[0] not in _replayed:
        _replayed.add(fitting[0])
        print(REPLAYS, fitting[0], flush=True)


def was_outvoted(runner: Any, batch: Any) -> bool:
    """With data-parallel attention all ranks replay, or none: not while another one prefills."""
    return graph_runner(runner).require_mlp_sync and not batch.can_run_decode_cuda_graph


def graph_sizes(runner: Any) -> list[int]:
    """The batch sizes for which a model runner has captured graphs; none if it decodes without."""
    graphs = graph_runner(runner)
    return sorted(graphs.capture_bs) if full_name(graphs) == EXPECTED_GRAPHS else []


def graph_runner(runner: Any) -> Any:
    """Of decodes; 0.5.13.post1 has one runner for all."""
    return getattr(runner, "decode_cuda_graph_runner", None) or getattr(runner, "graph_runner", None)


def full_name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"
