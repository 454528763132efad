"""Seam: a forward is made ready before what it waits for has come.

A stage knows its next batch before the proxies for it arrive (later stages) or the tokens (stage 0, see
ahead.py). Upstream makes the ForwardBatch, metadata of attention and inputs of a graph behind that wait. They
need nothing of what is waited for, so here they come before it. What arrives is put in last: proxies as an
argument of the model or into the inputs of a graph, ids likewise.

Upstream does so for drafts: a ForwardBatch that is marked as planned is not planned again
(`mark_forward_metadata_ready`). Nothing else is launched between a plan and its launch: a later stage plans
inside its launch, and what stage 0 has planned is the next that it launches, or is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_npu_pp.patching import Patch

from .pipeline import current, forward_stream

_MIXIN = "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin"
_WORKER = "sglang.srt.managers.tp_worker:TpModelWorker"
_RUNNER = "sglang.srt.model_executor.model_runner:ModelRunner"
_BATCH = "sglang.srt.model_executor.forward_batch_info:ForwardBatch"
_GRAPHS = "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner"
_EAGER = "sglang.srt.model_executor.runner.eager_runner:EagerRunner"
_NPU_GRAPHS = "sglang.srt.hardware_backend.npu.graph_runner.npu_graph_runner:NPUGraphRunner"


class Incoming:
    """Proxies that are waited for when all else of a forward is ready, in place of PPProxyTensors.

    The runner of the model takes them. Workers of drafts pass them on untouched; one that looked at them
    would wait there.
    """

    def __init__(self, wait: Callable[[], Any]) -> None:
        self._wait = wait
        self._proxies: Any = None

    def take(self) -> Any:
        """Wait, the first time; SGLang's PPProxyTensors."""
        if self._proxies is None:
            self._proxies = self._wait()
        return self._proxies

    @property
    def taken(self) -> bool:
        return self._proxies is not None

    @property
    def tensors(self) -> Any:
        return self.take().tensors

    def __getitem__(self, key: Any) -> Any:
        return self.take()[key]


def waits_last(scheduler: Any) -> bool:
    """Whether launches of this server bring what they wait for to its model untouched."""
    return (
        scheduler.is_generation
        and scheduler.dllm_config is None
        and not scheduler.require_mlp_sync  # other ranks' rows decide about a batch behind that wait
    )


def planned_without_ids(scheduler: Any, batch: Any) -> Any:
    """The ForwardBatch of a decode whose ids, int64 of shape (requests,), are not there yet."""
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    runner = scheduler.model_worker.model_runner
    with forward_stream(scheduler):
        _wait_for_what_is_scheduled(scheduler)
        # Ids that a model has: a graph computes its padding with what its inputs were last loaded with.
        batch.input_ids = torch.zeros_like(batch.req_pool_indices)
        forward_batch = ForwardBatch.init_new(batch, runner, **options_of_a_launch())
        batch.input_ids = None
        plan(runner, forward_batch)
    return forward_batch


def _wait_for_what_is_scheduled(scheduler: Any) -> None:
    """As the forward stream does before a launch; in a function of its own from 0.5.21 on."""
    if hasattr(scheduler, "_pp_wait_forward_dependencies"):
        scheduler._pp_wait_forward_dependencies()
    else:
        scheduler.forward_stream.wait_stream(scheduler.schedule_stream)


def options_of_a_launch() -> Mapping[str, Any]:
    """What `forward_batch_generation` makes a ForwardBatch with; up to 0.5.15.post1 a batch has it."""
    from sglang.srt.managers.schedule_batch import ScheduleBatch

    name = "return_hidden_states_before_norm"
    return {} if hasattr(ScheduleBatch, name) else {name: False}


def plan(runner: Any, forward_batch: Any) -> Any:
    """What upstream does for a decode before it calls the model; the runner of its graph, if it has one."""
    if not forward_batch.forward_mode.is_decode() or _plans_elsewhere(runner):
        return None
    graphs = runner.decode_cuda_graph_runner
    replays = bool(graphs) and graphs.can_run_graph(forward_batch)
    if replays and runner.device == "cpu":  # a graph there is compiled, and has no inputs to load
        return None
    if replays:
        graphs.load_batch(forward_batch)
    else:
        runner.attn_backend.init_forward_metadata(forward_batch)
    forward_batch.mark_forward_metadata_ready(replan_equivalent=True)
    return graphs if replays else None


def _plans_elsewhere(runner: Any) -> bool:
    """A model, or a cache of its tokens, that has a part in it; or the runner of 0.5.13.post1."""
    model = runner.model
    return (
        not hasattr(runner, "decode_cuda_graph_runner")
        or hasattr(model, "prepare_forward_batch")
        or hasattr(model, "prepare_for_forward")
        or runner.hisparse_coordinator is not None
    )


def forward(original: Any, runner: Any, forward_batch: Any, *arguments: Any, **options: Any) -> Any:
    incoming = options.get("pp_proxy_tensors")
    if isinstance(incoming, Incoming):
        graphs = plan(runner, forward_batch)
        options["pp_proxy_tensors"] = proxies = incoming.take()
        if graphs is not None and runner.device == "npu":  # its replay of what is planned leaves them out
            _put_into(graphs.buffers.pp_proxy_tensors, proxies.tensors)
    return original(runner, forward_batch, *arguments, **options)


def _put_into(inputs: Any, proxies: Any) -> None:
    """Of a graph, by name; rows behind a tensor's are padding, which no row of it reads."""
    for name, tensor in proxies.items():
        if (rows := inputs.get(name)) is not None:
            rows[: len(tensor)].copy_(tensor)


def forward_batch_generation(original: Any, worker: Any, batch: Any, *arguments: Any, **options: Any) -> Any:
    ahead = current().ahead
    planned = None if ahead is None or batch is None else ahead.take_forward(batch)
    if planned is None:
        return original(worker, batch, *arguments, **options)
    planned.input_ids = batch.input_ids
    return original(worker, None, planned, *arguments, **options)


_PLANNING = "eagle_prepare_for_verify of sglang plans before it launches; sglang's overlap schedule"
_PLAN = "goes when upstream plans a forward before it waits for its proxies"

PATCHES = (
    Patch(
        target=f"{_RUNNER}.forward",
        wrapper=forward,
        why="ForwardBatch, attention metadata and inputs of a graph are made when proxies are there",
        how="made before; proxies are waited for between that and the call of the model",
        upstream=_PLANNING,
        plan=_PLAN,
        relies_on=(
            f"{_RUNNER}._forward_raw",
            f"{_BATCH}.mark_forward_metadata_ready",
            f"{_BATCH}.needs_forward_metadata_init",
            f"{_GRAPHS}.can_run_graph",
            f"{_GRAPHS}.load_batch",
            f"{_GRAPHS}.execute",
            f"{_NPU_GRAPHS}.execute",
            f"{_EAGER}.load_batch",
            f"{_EAGER}._execute_decode",
        ),
    ),
    Patch(
        target=f"{_WORKER}.forward_batch_generation",
        wrapper=forward_batch_generation,
        why="the same on stage 0, when tokens are there",
        how="made with the decode that is prepared ahead; its ids are put in last",
        upstream=_PLANNING,
        plan=_PLAN,
        relies_on=(
            f"{_BATCH}.init_new",
            f"{_WORKER}.set_hicache_consumer",
            f"{_MIXIN}._pp_wait_forward_dependencies",
        ),
    ),
)
