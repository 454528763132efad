"""Seam: control requests with an outcome that may differ between stages (weights, LoRA, memory, ...).

Upstream handles them on every rank separately, and stage 0 answers with its own result: after a failure on a
later stage the client gets a success, only stage 0 has flushed its prefix cache, and the next request ends
the server. Here all stages exchange outcomes (an exception is a failure) before any consequence. Then, alike
on all, caches are flushed and the client is answered, or the change is undone and the answer names the failed
stage.

No deadlock: a stage passes the list on before handling, so all later stages get it. To reach it they need
only messages of earlier iterations: proxies, and outputs, whose sender never waits (`transport/window.py`).
So microbatches in flight drain. A rank sends its outcome before it waits, at the same place of the program on
all ranks: a control request is the last of its list (`intake.py`).

Not on disaggregated servers: there a stage waits in an iteration for ids that stage 0 sends in its next one,
after its requests, so this exchange would deadlock.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist

from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.outcomes import Outcome, failures, first_value, may_have_changed
from sglang_npu_pp.patching import Patch

from .disaggregation import is_disaggregated
from .intake import needs_agreement
from .parallel import get_parallel
from .pipeline import AsyncPipeline, current

logger = logging.getLogger("sglang_npu_pp")

_REFUSED = "sglang-npu-pp: "
_RAISED_LIMIT_S = 10.0  # in which ranks of a stage raise the same error, once one of them has
_NOT_FLUSHED = (
    "the weights were updated, but the prefix cache was not flushed because requests are running or waiting; "
    "finish or abort them, then call /flush_cache"
)
# Their handlers wait for the other ranks of the stage. When one raises on some ranks only, the others wait
# for ever; the server then ends, as upstream's does.
_COLLECTIVE = frozenset(
    (
        "UpdateWeightsFromTensorReqInput",
        "UpdateWeightsFromIPCReqInput",
        "BeginWeightUpdateReqInput",
        "EndWeightUpdateReqInput",
        "ReleaseMemoryOccupationReqInput",
        "ResumeMemoryOccupationReqInput",
        "RpcReqInput",
    )
)


@dataclass(frozen=True)
class Attempt:
    """Result of upstream's handler on this rank."""

    output: Any  # its answer, None if it has none or raised
    outcome: Outcome


def init_request_dispatcher(original: Any, scheduler: Any) -> None:
    original(scheduler)
    handlers = scheduler._request_dispatcher._mapping
    for kind, handler in handlers.items():
        if needs_agreement(kind):
            handlers[kind] = functools.partial(handle, scheduler, handler)


def handle(scheduler: Any, handler: Any, request: Any) -> Any:
    """Handle a control request on all stages; returns the client's answer."""
    pipeline = current()
    if is_disaggregated(scheduler):
        return handler(request)
    pipeline.send_requests()
    served = _served_weights(scheduler, request)
    attempt = _attempt(pipeline, handler, _without_consequences(request))
    outcomes = _all_outcomes(scheduler, pipeline, attempt.outcome)
    reason = failures(outcomes)
    if reason:
        reason += _undo(scheduler, pipeline, handler, request, outcomes, served)
        logger.error("sglang-npu-pp: %s: %s", type(request).__name__, reason)
        return _refusal(request, attempt.output, reason)
    if not _flush(scheduler, request):
        return _refusal(request, attempt.output, _NOT_FLUSHED)
    _record_version(scheduler, request)
    return _answer(attempt.output, outcomes)


def _attempt(pipeline: AsyncPipeline, handler: Any, request: Any) -> Attempt:
    here = Outcome(pipeline.link.stage, pipeline.link.rank)
    try:
        output = handler(request)
    except PipelineError:
        raise
    except Exception as error:
        if type(request).__name__ in _COLLECTIVE and not _all_ranks_raised(pipeline):
            raise
        logger.exception("sglang-npu-pp: %s failed", type(request).__name__)
        return Attempt(None, replace(here, failure=_in_words(error), raised=True))
    success = getattr(output, "success", getattr(output, "updated", True))
    if not success:
        return Attempt(output, replace(here, failure=_message(output)))
    return Attempt(output, replace(here, value=getattr(output, "parameter", None)))


def _all_ranks_raised(pipeline: AsyncPipeline) -> bool:
    """Whether all ranks of this stage raised, so that none waits in the handler's collectives."""
    prefix = f"sglang_npu_pp/raised/{pipeline.iteration}/{pipeline.link.stage}"
    keys = [f"{prefix}/{rank}" for rank in range(_ranks_of_a_stage())]
    store = dist.distributed_c10d._get_default_store()
    store.set(keys[pipeline.link.rank], "yes")
    try:
        store.wait(keys, timedelta(seconds=_RAISED_LIMIT_S))
    except RuntimeError:
        return False
    return True


def _without_consequences(request: Any) -> Any:
    """The local part; effects on later requests come after the agreement."""
    later = {"flush_cache": False, "weight_version": None}
    changes = {name: value for name, value in later.items() if hasattr(request, name)}
    return _changed(request, **changes) if changes else request


def _all_outcomes(scheduler: Any, pipeline: AsyncPipeline, outcome: Outcome) -> list[Outcome]:
    """Outcomes of all ranks of all stages, in one order. Data-parallel groups with control requests of their
    own may be in different iterations, so they agree among stages only."""
    outcomes = pipeline.exchange_outcomes(outcome)
    alone = getattr(scheduler.server_args, "enable_dp_attention_local_control_broadcast", False)
    if _ranks_of_a_stage() == 1 or alone:
        return outcomes
    from sglang.srt.distributed import get_tp_group

    gathered: list[Any] = [None] * _ranks_of_a_stage()
    dist.all_gather_object(gathered, outcomes, group=get_tp_group().cpu_group)
    return [outcome for outcomes in zip(*gathered, strict=True) for outcome in outcomes]


def _ranks_of_a_stage() -> int:
    return int(get_parallel().tp_size)


# --- consequences of a success -----------------------------------------------------------------


def _flush(scheduler: Any, request: Any) -> bool:
    """False while requests run or wait, equally on all stages."""
    if not getattr(request, "flush_cache", False):
        return True
    return bool(scheduler.flush_cache(empty_cache=getattr(request, "torch_empty_cache", True)))


def _record_version(scheduler: Any, request: Any) -> None:
    version = getattr(request, "weight_version", None)
    if version is not None and hasattr(scheduler, "record_weight_version_change"):
        scheduler.record_weight_version_change(new_version=version)


def _answer(output: Any, outcomes: list[Outcome]) -> Any:
    """The stage with the layer answers for a weight."""
    if hasattr(output, "parameter") and output.parameter is None:
        return _changed(output, parameter=first_value(outcomes))
    return output


# --- consequences of a failure -----------------------------------------------------------------


def _served_weights(scheduler: Any, request: Any) -> tuple[str, Any] | None:
    """Path and format of the weights before an update from disk."""
    if type(request).__name__ != "UpdateWeightFromDiskReqInput":
        return None
    runner = scheduler.tp_worker.model_runner
    load_format = runner.load_config.load_format
    return runner.model_config.model_path, getattr(load_format, "value", load_format)


def _undo(
    scheduler: Any,
    pipeline: AsyncPipeline,
    handler: Any,
    request: Any,
    outcomes: list[Outcome],
    served: tuple[str, Any] | None,
) -> str:
    """Restore equality of the stages where possible; returns an addition to the reason."""
    if served is not None:
        return _restore(scheduler, pipeline, handler, request, outcomes, served)
    if not may_have_changed(outcomes):
        return ""
    if type(request).__name__.startswith("UpdateWeights"):
        return (
            "; the stages may have different weights now: do not use answers before an update succeeds on "
            "all stages, and flush the prefix cache then"
        )
    return _take_back(scheduler, pipeline, request, outcomes)


def _restore(
    scheduler: Any,
    pipeline: AsyncPipeline,
    handler: Any,
    request: Any,
    outcomes: list[Outcome],
    served: tuple[str, Any],
) -> str:
    """Upstream's way (load the previous weights again), but on all stages, from the path saved before the
    update."""
    path, load_format = served
    if not may_have_changed(outcomes):
        scheduler.tp_worker.model_runner.model_config.model_path = path
        return ""
    again = _changed(_without_consequences(request), model_path=path, load_format=load_format)
    attempt = _attempt(pipeline, handler, again)
    failed = failures(_all_outcomes(scheduler, pipeline, attempt.outcome))
    flushed = _flush(scheduler, request)
    if failed:
        return (
            f"; loading the weights of {path} again failed as well ({failed}), so the stages have different "
            "weights now: do not use answers before an update succeeds on all stages"
        )
    cache = "" if flushed else "; the prefix cache was not flushed because requests are running or waiting"
    return f"; all stages have loaded the weights of {path} again{cache}"


def _take_back(scheduler: Any, pipeline: AsyncPipeline, request: Any, outcomes: list[Outcome]) -> str:
    """Remove it from the ranks that have it."""
    undo = _undo_by(scheduler, request)
    succeeded = [(each.stage, each.rank) for each in outcomes if each.failure is None]
    if undo is None or not succeeded:
        return ""
    if (pipeline.link.stage, pipeline.link.rank) in succeeded:
        _attempt(pipeline, *undo)
    return "; it was undone where it had succeeded"


def _undo_by(scheduler: Any, request: Any) -> tuple[Any, Any] | None:
    """Upstream's handler that undoes this request on one rank, and its request."""
    from sglang.srt.managers import io_struct

    name = type(request).__name__
    if name.startswith("LoadLoRAAdapter"):
        adapter = {"lora_name": request.lora_name, "lora_id": request.lora_id}
        return scheduler.tp_worker.unload_lora_adapter, io_struct.UnloadLoRAAdapterReqInput(**adapter)
    if name == "AttachHiCacheStorageReqInput":
        return scheduler.detach_hicache_storage_wrapped, io_struct.DetachHiCacheStorageReqInput()
    if name == "InitWeightsUpdateGroupReqInput":
        group = io_struct.DestroyWeightsUpdateGroupReqInput(group_name=request.group_name)
        return scheduler.weight_updater.destroy_weights_update_group, group
    return None


def _refusal(request: Any, output: Any, reason: str) -> Any:
    """Upstream's failure answer to this request, with the reason; None if it has none."""
    if output is None:
        output = _blank_answer(request)
        if output is None:
            return None
    changes: dict[str, Any] = {}
    for name, value in (
        ("success", False),
        ("updated", False),
        ("message", reason),
        ("error_message", reason),
    ):
        if hasattr(output, name):
            changes[name] = value
    if getattr(output, "loaded_adapters", None):
        changes["loaded_adapters"] = _without_adapter(output.loaded_adapters, request)
    if "success" not in changes and "updated" not in changes:
        changes["rid"] = _REFUSED + reason  # an answer without words: `collect_replies` reads it
    return _changed(output, **changes)


def _blank_answer(request: Any) -> Any:
    from sglang.srt.managers import io_struct

    kind = getattr(io_struct, type(request).__name__.removesuffix("Input") + "Output", None)
    if kind is None:
        return None
    known = {"success": False, "updated": False, "message": "", "parameter": None}
    return kind(**{name: known.get(name) for name in _required(kind)})


def _without_adapter(adapters: Any, request: Any) -> Any:
    """For a load that was undone."""
    if type(request).__name__.startswith("Load"):
        return {name: path for name, path in adapters.items() if name != request.lora_name}
    return adapters


def _message(output: Any) -> str:
    words = getattr(output, "message", None) or getattr(output, "error_message", None)
    return (words or "refused, the log says why").rstrip(".")


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".: ")


# --- upstream's messages, which are dataclasses in 0.5.14 -----------------------------------------


def _changed(message: Any, /, **changes: Any) -> Any:
    if not dataclasses.is_dataclass(message):
        return msgspec.structs.replace(message, **changes)
    changed = copy.copy(message)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _required(kind: Any) -> list[str]:
    """Fields without a default."""
    if not dataclasses.is_dataclass(kind):
        return [field.name for field in msgspec.structs.fields(kind) if field.required]
    missing = dataclasses.MISSING
    return [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is missing and field.default_factory is missing
    ]


# --- the client's side -------------------------------------------------------------------------


async def collect_replies(original: Any, communicator: Any, request: Any) -> Any:
    """Some answers of upstream have no field for a failure. In the process of the HTTP server."""
    replies = await original(communicator, request)
    for reply in replies:
        reason = getattr(reply, "rid", None)
        if isinstance(reason, str) and reason.startswith(_REFUSED):
            from fastapi import HTTPException

            raise HTTPException(status_code=400, detail=reason)
    return replies


_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater:SchedulerWeightUpdaterManager"
_DISPATCHER = "sglang.utils:TypeBasedDispatcher"

PATCHES = (
    Patch(
        target=f"{_SCHEDULER}.init_request_dispatcher",
        wrapper=init_request_dispatcher,
        why="stages handle control requests alone and stage 0 answers with its own result; a failure on a "
        "later stage looks like a success, and caches differ; an exception of a handler ends the server",
        how="all stages exchange outcomes before caches are flushed and the client is answered",
        upstream="none known",
        plan="goes when upstream gathers the results of all stages",
        relies_on=(
            f"{_DISPATCHER}.__init__",
            f"{_DISPATCHER}.__call__",
            f"{_SCHEDULER}.flush_cache",
            f"{_SCHEDULER}.is_fully_idle",
            f"{_SCHEDULER}.record_weight_version_change",
            f"{_UPDATER}.update_weights_from_disk",
            f"{_UPDATER}.update_weights_from_distributed",
            f"{_UPDATER}.update_weights_from_tensor",
            f"{_UPDATER}.update_weights_from_ipc",
            f"{_UPDATER}.flush_cache_after_weight_update",
            "sglang.srt.managers.tp_worker:BaseTpWorker.unload_lora_adapter",
        ),
    ),
)

# In the process that answers clients, which has no pipeline.
CLIENT_PATCHES = (
    Patch(
        target="sglang.srt.managers.communicator:FanOutCommunicator.__call__",
        wrapper=collect_replies,
        why="answers to some control requests have no field for a failure: upstream's servers end then",
        how="such a failure is reported as an error of the request",
        upstream="none known",
        plan="goes with the patch of Scheduler.init_request_dispatcher",
    ),
)
