"""Seam: start of a scheduler process (agreement, lanes, warm-up), and idle waiting.

Runs behind upstream's process groups (up to 0.5.20 of the model runner, later of the scheduler), before the
model is loaded: ranks are close in time, and communicators count in measured memory.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from sglang_npu_pp.agreement import agree
from sglang_npu_pp.errors import (
    ContractError,
    DifferenceError,
    PipelineError,
    SettingsError,
    TransportError,
)
from sglang_npu_pp.observe.metrics import DEVICE_SLOTS, SLOTS, WINDOW_BYTES, WINDOW_MESSAGES, Exporter, Metric
from sglang_npu_pp.observe.reporting import Reporter
from sglang_npu_pp.observe.stage_times import DepthAdviser
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.settings import Settings, load_settings
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.token_return import PORT, TokenReturn
from sglang_npu_pp.transport.clock import measure_clock
from sglang_npu_pp.transport.context import RankContext
from sglang_npu_pp.transport.device_lane import DeviceLane, create_neighbour_groups, slot_bytes_for
from sglang_npu_pp.transport.endpoints import process_group_exchange
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import PROTOCOL
from sglang_npu_pp.transport.stage_link import StageLink
from sglang_npu_pp.version import __version__

from .ahead import Ahead, can_prepare
from .dp_metadata import open_metadata
from .features import AHEAD, certificate, functions, in_force, in_use, unknown_to_a_server, unsupported
from .forwards import waits_last
from .groups import attach_link
from .idle import sleep_when_idle
from .parallel import get_parallel
from .pipeline import (
    AsyncPipeline,
    LoopPosition,
    Parts,
    current,
    has_pipeline,
    leave_to_upstream,
    set_current,
)

LAST_PORT = 65535

logger = logging.getLogger("sglang_npu_pp")


_without_groups: list[Any] = []  # the scheduler of this process until its process groups exist
_decision: str | None = None


def set_decision(sentence: str) -> None:
    """The plugin's decision in this process, for the scheduler's log."""
    global _decision
    _decision = sentence


def init_idle_sleeper(original: Any, scheduler: Any) -> None:
    """Called once by upstream, right behind its sockets."""
    from sglang.srt.distributed.parallel_state import model_parallel_is_initialized

    original(scheduler)
    if model_parallel_is_initialized():
        _start(scheduler)
    else:
        _without_groups.append(scheduler)


def init_torch_distributed(original: Any, runner: Any) -> Any:
    """Up to 0.5.20 makes the process groups; for the model and a draft model."""
    result = original(runner)
    while _without_groups:
        _start(_without_groups.pop())
    return result


def _start(scheduler: Any) -> None:
    parallel = get_parallel()
    where = f"stage {parallel.pp_rank} rank {parallel.tp_rank}"
    settings = load_settings()
    arguments = scheduler.server_args
    reason, without = unsupported(arguments), unknown_to_a_server(arguments, separable=True)
    refused = reason or without
    if refused is not None and settings.mode == "require":
        raise ContractError(
            f"{where}: {refused}, and SGLANG_NPU_PP=require; start without it, or set "
            "SGLANG_NPU_PP=auto to serve on upstream's path."
        )
    if parallel.pp_size == 1:
        logger.info("sglang-npu-pp: %s; one stage, nothing to make asynchronous", _decision)
        return
    _agree_with_all_ranks(settings, reason)
    if reason is not None:
        logger.warning("sglang-npu-pp: %s stays on upstream's path: %s", where, reason)
        leave_to_upstream()
        return
    if without is not None:
        logger.warning("sglang-npu-pp: %s is patched in part: %s", where, without)
    replica = None if scheduler.server_args.enable_dp_attention else _dp_rank(scheduler, parallel)
    context = RankContext.begin(
        parallel.pp_rank, parallel.pp_size, settings, rank=parallel.tp_rank, replica=replica
    )
    host_lane = _open_host_lane(scheduler, parallel, context)
    if host_lane is None:
        leave_to_upstream()
        return
    pipeline = AsyncPipeline(_make_parts(scheduler, parallel, host_lane))
    set_current(pipeline)
    atexit.register(pipeline.close)  # the other stages then know that this one left on purpose
    if settings.idle_sleep == "1":
        sleep_when_idle(scheduler, parallel)
    lane = "host" if pipeline.link.device_lane is None else "device"
    logger.info(
        "sglang-npu-pp: %s; %s of %d stages, proxies on the %s lane, tokens and requests on the host lane",
        _decision,
        where,
        parallel.pp_size,
        lane,
    )
    logger.info("sglang-npu-pp: %s uses %s", where, ", ".join(in_use(scheduler.server_args)))


def init_pp_loop_state(original: Any, scheduler: Any) -> None:
    """Begins every event loop, on the schedule stream."""
    original(scheduler)
    pipeline = current()
    allocator = scheduler.token_to_kv_pool_allocator
    names = ("free_pages", "release_pages")
    pipeline.first_free_pages = [getattr(allocator, name, None) for name in names]
    if pipeline.link.context.settings.ahead == "0" or not in_force().get(AHEAD):
        return
    pipeline.waits_last = waits_last(scheduler)
    if pipeline.link.stage == 0 and can_prepare(scheduler):
        pipeline.ahead = _open_ahead(scheduler, pipeline)


def _open_ahead(scheduler: Any, pipeline: AsyncPipeline) -> Ahead:
    wanted = pipeline.link.context.settings.ahead
    # On a CPU a launch is the forward, and tokens would leave behind it.
    launch_first = wanted == "1" or pipeline.streams.asynchronous
    also = " and launches them before it processes their tokens" if launch_first else ""
    logger.info("sglang-npu-pp: %s prepares decodes ahead%s", pipeline.link.context.where, also)
    return Ahead(scheduler, pipeline.link, pipeline.streams, launch_first)


def _agree_with_all_ranks(settings: Settings, reason: str | None) -> None:
    from sglang.version import __version__ as release

    statement = {
        "sglang": release,
        "sglang-npu-pp": __version__,
        "protocol": str(PROTOCOL),
        "path": "asynchronous" if reason is None else f"upstream ({reason})",
        "features": ", ".join(name for name, known in in_force().items() if known),
        "functions": functions(),
        "certificate": certificate(),
        **settings.shared_values(),
    }
    agree(
        dist.distributed_c10d._get_default_store(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        statement=statement,
        limit_s=settings.start_limit_s,
    )


def _open_host_lane(scheduler: Any, parallel: Any, context: RankContext) -> HostLane | None:
    """None, for upstream's path with `auto`, if a rank cannot open it.

    Upstream's groups may use other addresses, ports and files: this must start wherever they do.
    """
    settings = context.settings
    host_lane = HostLane(
        context,
        host=settings.host,
        master=scheduler.server_args.dist_init_addr,
        port=_own_port(scheduler, parallel, settings.port),
        slots=_slots(scheduler, parallel),
    )
    failure: PipelineError | None = None
    try:
        host_lane.open(process_group_exchange(parallel.pp_group.cpu_group))
    except PipelineError as error:
        failure = error
    failure = failure_of_any_rank(failure, context.where, settings.start_limit_s)
    if failure is None:
        return host_lane
    host_lane.close()
    if settings.mode == "require":
        raise failure
    logger.warning("sglang-npu-pp: %s stays on upstream's path: %s", context.where, failure)
    return None


def failure_of_any_rank(
    failure: PipelineError | None, where: str, start_limit_s: float
) -> PipelineError | None:
    """Our own, another rank's, or None on all ranks. Raises AgreementError for a silent rank."""
    try:
        agree(
            dist.PrefixStore("sglang_npu_pp/host_lane", dist.distributed_c10d._get_default_store()),
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            statement={"the host lane": "open" if failure is None else str(failure)},
            limit_s=2 * start_limit_s,  # a rank that could not open it has tried for the limit
        )
    except DifferenceError as error:
        return failure or TransportError(f"{where}: not all ranks could open their host lane. {error}")
    return failure


def _own_port(scheduler: Any, parallel: Any, first: int) -> int:
    """Port of this rank, 0 for any. Data-parallel replicas have worlds of their own."""
    if not first:
        return 0
    ranks, replicas = _ranks(scheduler, parallel), scheduler.server_args.dp_size
    apart = replicas > 1 and ranks.attn_dp_size == 1
    replica, replicas = (ranks.dp_rank or 0, replicas) if apart else (0, 1)
    if first + replicas * dist.get_world_size() - 1 > LAST_PORT:  # on all ranks, though some would find one
        raise SettingsError(
            f"stage {parallel.pp_rank} rank {parallel.tp_rank}: SGLANG_NPU_PP_PORT={first} leaves no port "
            "for each rank; set it lower."
        )
    return first + replica * dist.get_world_size() + dist.get_rank()


def _slots(scheduler: Any, parallel: Any) -> int:
    """Microbatches in flight, at most."""
    return parallel.pp_size + scheduler.server_args.pp_async_batch_depth


def _make_parts(scheduler: Any, parallel: Any, host_lane: HostLane) -> Parts:
    """In one order on all ranks: most parts talk to other stages."""
    context = host_lane.context
    streams = DeviceStreams(parallel.pp_group.device, pinned=context.settings.pin_memory == "1")
    slots = _slots(scheduler, parallel)
    clock = measure_clock(host_lane, context.settings.start_limit_s)
    link = StageLink(host_lane, _open_device_lane(scheduler, parallel, streams, context), clock)
    token_return = _open_token_return(link, streams)
    host_lane.seal()
    attach_link(parallel.pp_group, link)
    reporter = Reporter(context.settings, context.telemetry, context.trace, clock)
    reporter.install()
    if scheduler.server_args.enable_metrics:
        _export(link, slots, _replica(scheduler, parallel))
    loop = LoopPosition(link, slots)
    metadata = open_metadata(scheduler, parallel, loop)
    depth = scheduler.server_args.pp_async_batch_depth
    adviser = DepthAdviser(link, streams, depth) if context.rank == 0 else None
    return Parts(scheduler, link, streams, loop, reporter, token_return, metadata, adviser)


def _export(link: StageLink, slots: int, labels: Mapping[str, str]) -> None:
    """A failure (a full disk, say) does not prevent serving."""
    bounds, settings = link.host_lane.bounds, link.context.settings
    limits: dict[Metric, float] = {
        SLOTS: slots,
        WINDOW_MESSAGES: bounds.messages,
        WINDOW_BYTES: bounds.nbytes,
        DEVICE_SLOTS: 0 if link.device_lane is None else settings.slots,
    }
    try:
        Exporter(link.telemetry, limits, features=in_force(), labels=labels).start()
    except Exception:
        logger.exception("sglang-npu-pp: this rank goes on without metrics")


def _replica(scheduler: Any, parallel: Any) -> dict[str, str]:
    """Label of a data-parallel replica; rank numbers repeat."""
    dp_rank = _dp_rank(scheduler, parallel)
    return {} if dp_rank is None else {"dp_rank": str(dp_rank)}


def _dp_rank(scheduler: Any, parallel: Any) -> int | None:
    """None with one replica. With data-parallel attention all are ranks of one group."""
    found: int | None = _ranks(scheduler, parallel).dp_rank
    return found


def _ranks(scheduler: Any, parallel: Any) -> Any:
    """Owner of the data-parallel ranks: up to 0.5.20 the scheduler."""
    return getattr(scheduler, "ps", parallel)


def _open_device_lane(
    scheduler: Any, parallel: Any, streams: DeviceStreams, context: RankContext
) -> DeviceLane | None:
    """For device tensors; on CPU only on request, over gloo."""
    group, wanted = parallel.pp_group, context.settings.proxy_lane
    if wanted == "host" or (wanted == "auto" and not streams.asynchronous):
        return None
    backend = None if streams.asynchronous else "gloo"
    previous, following = create_neighbour_groups(group.ranks, parallel.pp_rank, backend)
    lane = DeviceLane(
        context,
        group.device,
        previous=previous,
        following=following,
        slots=context.settings.slots,
        slot_bytes=_slot_bytes(scheduler, parallel),
    )
    lane.warm_up()
    logger.info(
        "sglang-npu-pp: %s: the device lane has reserved %.1f MB for its slots",
        context.where,
        lane.reserved_bytes / 1e6,
    )
    return lane


def _slot_bytes(scheduler: Any, parallel: Any) -> int:
    """Of the largest prefill's proxies; SGLang measures its KV pool beside them."""
    arguments, model = scheduler.server_args, scheduler.model_config
    tokens = arguments.chunked_prefill_size
    if tokens is None or tokens <= 0:  # no chunks
        tokens = arguments.max_prefill_tokens
    indices = _shared_indices(model.hf_text_config)
    return slot_bytes_for(tokens, model.hidden_size, model.dtype.itemsize, parallel.attn_tp_size, indices)


def _shared_indices(config: Any) -> int:
    """A token's, in the proxies of sparse attention (DSA): a stage may begin with a layer that takes those of
    the layer before. Which one does is not known before the layers are there."""
    every = max(getattr(config, name, None) or 1 for name in ("index_topk_freq", "cli_factor"))
    if every == 1 and getattr(config, "index_topk_pattern", None) is None:
        return 0
    return getattr(config, "index_topk", None) or 0


def _open_token_return(link: StageLink, streams: DeviceStreams) -> TokenReturn | None:
    """The last stage sends; on a device from a thread with its own connections."""
    last = link.stages - 1
    outboxes = link.host_lane.open_port(PORT, senders=[last]) if streams.asynchronous else None
    return TokenReturn(link, outboxes, streams.adopt_thread) if link.stage == last else None


_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"

PATCHES = (
    Patch(
        target=f"{_SCHEDULER}.init_idle_sleeper",
        wrapper=init_idle_sleeper,
        why="lanes must be open and agreed on before the first request; an idle server spins",
        how="start the pipeline behind upstream's process groups; sleep on the client sockets while nothing "
        "has to be polled",
        upstream="vllm #56956 and Megatron #5240 (lazy communicators deadlock); --sleep-on-idle",
        plan="the start stays as long as the lanes do; the sleeper goes when it is the default",
        relies_on=(
            "sglang.srt.managers.scheduler_components.idle_sleeper:IdleSleeper.__init__",
            "sglang.srt.managers.scheduler_components.idle_sleeper:IdleSleeper.maybe_sleep",
            f"{_SCHEDULER}.on_idle",
            f"{_SCHEDULER}.is_fully_idle",
            "sglang.srt.managers.scheduler:dispatch_event_loop",
        ),
    ),
    Patch(
        target="sglang.srt.model_executor.model_runner:ModelRunner.init_torch_distributed",
        wrapper=init_torch_distributed,
        why="the process groups that the start needs do not exist before",
        how="start behind it",
        upstream="0.5.21 makes them in the scheduler, before init_idle_sleeper",
        plan="goes with 0.5.20",
        unless="sglang.srt.distributed.bootstrap:init_parallel_runtime",
    ),
    Patch(
        target="sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin.init_pp_loop_state",
        wrapper=init_pp_loop_state,
        why="the first list of free pages is made on the default stream and freed when pages are first taken "
        "from it; the schedule stream may not have read it then, since the host no longer waits",
        how="keep a reference to it",
        when=has_pipeline,
        upstream="vllm #54962 is of this kind; found on simulated Ascend, with freed memory overwritten",
        plan="goes when SGLang makes its pools on the stream that uses them",
    ),
)
