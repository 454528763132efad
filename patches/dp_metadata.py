"""Seam: metadata of data-parallel attention ranks, before every microbatch.

With `--enable-dp-attention` ranks share the MLP, not batches: one row a rank (tokens, kind of batch, graph
votes). Upstream builds tensors from lists, gathers on the tensor-parallel device group, behind running
forwards, and copies with a blocking `.cpu()`; here a `RowGather` does.

Upstream decides from the rows. A rank without a batch waits for them at once, others after their proxies:
upstream's function runs provisionally, with this rank's row for all, and again in the launch, setting the
same batch attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.row_gather import RowGather, create_row_group

from .pipeline import LoopPosition, current

_MODULE = "sglang.srt.managers.scheduler_components.dp_attn"
_KIND = "metadata"  # in counters and traces
_MODE = 5  # column of the forward mode


class Column(NamedTuple):
    """A number of the row: upstream's attribute; attribute and function of the result."""

    name: str
    result: str | None = None
    combine: Callable[[Any], Any] = list


# In upstream's order, on which it relies itself for the first six. A release has those of its dataclass.
COLUMNS = (
    Column("num_tokens", "global_num_tokens"),
    Column("num_tokens_for_logprob", "global_num_tokens_for_logprob"),
    Column("can_cuda_graph", "can_cuda_graph", all),  # up to 0.5.16
    Column("can_run_decode_cuda_graph", "can_run_decode_cuda_graph", all),
    Column("is_extend_in_batch", "is_extend_in_batch", any),
    Column("local_can_run_tbo"),
    Column("local_forward_mode"),
    Column("can_run_breakable_cuda_graph", "can_run_breakable_cuda_graph", all),  # up to 0.5.16
    Column("can_run_prefill_cuda_graph", "can_run_prefill_cuda_graph", all),
    Column("prefill_cuda_graph_max_prefix_len", "prefill_cuda_graph_max_prefix_len", max),
    Column("can_run_draft_cuda_graph", "can_run_draft_cuda_graph", all),
    Column("is_health_check", "any_health_check", any),
    Column("attention_pairs", "global_attention_pairs"),
)


class DPMetadata:
    """Rows of one stage's data-parallel ranks, one microbatch at a time."""

    def __init__(self, rows: RowGather, scheduler: Any, loop: LoopPosition) -> None:
        self._rows, self._scheduler, self._loop = rows, scheduler, loop
        self._may_wait_later = False  # whether the batch at hand is content with provisional decisions
        self._unfinished: Callable[[], Any] | None = None
        self._columns = columns_of_this_release()

    def prepare(self, original: Callable[..., Any], batch: Any, *arguments: Any, **options: Any) -> Any:
        """Upstream's result; without the rows, provisional until `finish`."""

        def decide() -> Any:
            return original(batch, *arguments, **options)

        self.finish()  # of a batch that was not launched
        carry = options.get("sync_wait_carry")  # 0.5.22 and later: seconds, for the step that reads them
        carried_s = None if carry is None else carry.seconds
        self._may_wait_later = self._can_be_decided_later(batch)
        try:
            prepared = decide()
        finally:
            self._may_wait_later = False
        if self._rows.posted is not None:
            self._unfinished = decide
            if carry is not None:
                carry.seconds = carried_s  # for the final decisions
        return prepared

    def gather(self, info: Any) -> None:
        """Post the row of `info`, once; fill in all rows, or provisionally this one for all.

        Raises PipelineError for a changed row.
        """
        row = [int(getattr(info, column.name)) for column in self._columns]
        if self._rows.posted is None:
            self._rows.post(row)
            self._record("post")
            if self._may_wait_later and not _could_be_converted(info):
                self._fill(info, torch.tensor([row] * self._rows.ranks), wait_s=0.0)
                return
        elif self._rows.posted != tuple(row):
            raise PipelineError(
                f"{self._rows.where}: the batch of this microbatch changed from {self._rows.posted} to "
                f"{tuple(row)} after the other ranks were told of it; report this."
            )
        self._record("wait")
        rows = self._rows.wait()
        self._record("ready")
        self._fill(info, rows, self._rows.last_wait_s)

    def finish(self) -> None:
        """Just before a launch: make provisional decisions final."""
        if self._unfinished is not None:
            decide, self._unfinished = self._unfinished, None
            decide()

    def carries(self, info: Any, device: Any) -> bool:
        """Whether these are our ranks. Not with offloaded weights: all then avoid the device."""
        replicas = info.num_dp_ranks if hasattr(info, "num_dp_ranks") else info.dp_size
        ranks = replicas * info.tp_size * info.cp_size
        return ranks == self._rows.ranks and not (self._rows.on_device and device == "cpu")

    def _can_be_decided_later(self, batch: Any) -> bool:
        """Not if `_arm_prefill_decode_interval` reads rows before the launch (decodes:
        `_could_be_converted`), nor on the first stage, which awaits no proxies."""
        if batch is None or batch.forward_mode.is_idle() or batch.forward_mode.is_prebuilt():
            return False
        interval = getattr(self._scheduler, "prefill_decode_interval", 0)
        return self._loop.link.stage > 0 and interval == 0

    def _record(self, name: str) -> None:
        self._loop.link.trace.record(name, _KIND, self._loop.slot, self._loop.iteration)

    def _fill(self, info: Any, rows: torch.Tensor, wait_s: float) -> None:
        """As upstream's `all_gather`: a replica's first rank speaks for it."""
        table = rows.view(-1, info.tp_size * info.cp_size, len(self._columns))[:, 0, :]
        setattr(info, "tp0_info_cpu" if hasattr(info, "tp0_info_cpu") else "tp0_info", table)
        by_column = list(zip(*table.tolist(), strict=True))
        for column, values in zip(self._columns, by_column, strict=True):
            if column.result is not None:
                setattr(info, column.result, column.combine(values))
        if hasattr(info, "sync_wait_seconds"):
            info.sync_wait_seconds = wait_s
        from sglang.srt.managers.scheduler_components import dp_attn

        if dp_attn._ENABLE_METRICS_DP_ATTENTION:
            info.dp_cooperation_info = dp_attn.DPCooperationInfo.create(by_column[_MODE])


def columns_of_this_release() -> tuple[Column, ...]:
    from sglang.srt.managers.scheduler_components.dp_attn import MLPSyncBatchInfo

    has = {field.name for field in dataclasses.fields(MLPSyncBatchInfo)}
    return tuple(column for column in COLUMNS if column.name in has)


def open_metadata(scheduler: Any, parallel: Any, loop: LoopPosition) -> DPMetadata | None:
    """None without data-parallel attention, and with elastic expert parallelism.

    Makes and warms up a communicator, on all the stage's ranks, before memory is measured.
    """
    arguments = scheduler.server_args
    enabled = arguments.enable_dp_attention or getattr(parallel, "enable_dp_attention", False)
    if not enabled or getattr(arguments, "elastic_ep_backend", None) is not None:
        return None
    group = parallel.tp_group
    context = loop.link.context
    device = torch.device("cpu") if context.settings.dp_metadata == "host" else torch.device(group.device)
    rows = RowGather(
        create_row_group(group.ranks, device),
        len(columns_of_this_release()),
        device,
        context.telemetry.receiving(_KIND),
        where=context.where,
        pinned=context.settings.pin_memory == "1",
    )
    rows.warm_up()
    return DPMetadata(rows, scheduler, loop)


def _could_be_converted(info: Any) -> bool:
    """From 0.5.20 on a decode becomes a prefill before the launch, beside another rank's prefill and with all
    votes."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    decodes = ForwardMode(info.local_forward_mode).is_decode()
    return decodes and bool(getattr(info, "can_run_prefill_cuda_graph", False))


def _metadata() -> DPMetadata | None:
    metadata = current().metadata
    # The pipeline's type says less, since its module is imported here; nothing else is ever put there.
    assert metadata is None or isinstance(metadata, DPMetadata)
    return metadata


def all_gather(original: Any, info: Any, device: Any, group: Any, use_all_reduce: bool = False) -> None:
    """`use_all_reduce`: elastic expert parallelism, from 0.5.16 on."""
    metadata = _metadata()
    if metadata is None or use_all_reduce or not metadata.carries(info, device):
        more = {"use_all_reduce": True} if use_all_reduce else {}
        original(info, device=device, group=group, **more)
    else:
        metadata.gather(info)


def prepare_batch(original: Any, local_batch: Any, *arguments: Any, **options: Any) -> Any:
    metadata = _metadata()
    if metadata is None:
        return original(local_batch, *arguments, **options)
    return metadata.prepare(original, local_batch, *arguments, **options)


_PLAN = "goes when upstream gathers on a group of its own and copies the rows without blocking"
_UPSTREAM = "vllm-ascend #2582 (with_prefill was wrong there in eager mode; here upstream decides), #10046"

PATCHES = (
    Patch(
        target=f"{_MODULE}:MLPSyncBatchInfo.all_gather",
        wrapper=all_gather,
        why="tensors are made of lists at every step, the gather queues behind the collectives of forwards, "
        "and `.cpu()` makes the host wait for it",
        how="one gather on buffers and a communicator of its own; a pinned copy and an event",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_MODULE}:MLPSyncBatchInfo._get_local_tensor",
            f"{_MODULE}:MLPSyncBatchInfo._get_fallback_tensor",
            "sglang.srt.observability.metrics_collector:DPCooperationInfo.create",
        ),
    ),
    Patch(
        target=f"{_MODULE}:prepare_mlp_sync_batch_raw",
        wrapper=prepare_batch,
        why="it reads the rows right behind the gather, also where nothing depends on them before the launch",
        how="with a batch and proxies to wait for, it decides as if all ranks had the row of this one, and "
        "in the launch once more, from the rows",
        upstream=_UPSTREAM,
        plan=_PLAN,
        relies_on=(
            f"{_MODULE}:_update_gather_batch",
            f"{_MODULE}:SchedulerDPAttnAdapter.prepare_mlp_sync_batch",
            f"{_MODULE}:SchedulerDPAttnAdapter.maybe_prepare_mlp_sync_batch",
            f"{_MODULE}:SchedulerDPAttnAdapter.maybe_convert_decode_to_extend",
            "sglang.srt.managers.scheduler:Scheduler.get_next_batch_to_run",
            "sglang.srt.managers.scheduler:Scheduler._arm_prefill_decode_interval",
        ),
    ),
)
