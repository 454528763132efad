"""Asynchronous gather of one row of integers from every rank of a group.

For data-parallel attention: token counts and kind of batch before a forward. One collective a step, on
preallocated buffers (pinned, unless set otherwise); on an accelerator with its own stream and communicator,
so not after launched forwards.

Ideas: vllm-ascend #2582 (one packed collective on the device, preallocated; there on the model's group), vllm
#39115 (a reused event races, so a fresh one a copy).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from .errors import PeerLostError, PipelineError
from .observe.telemetry import ChannelCounters
from .streams import DeviceStreams

# HCCL takes twice so much memory of the device for a communicator, 200 MB by default, and
# these rows have a few bytes. vllm-ascend gives 50 to the group of its own metadata.
_HCCL_BUFFER_MB = 50

_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def create_row_group(ranks: Sequence[int], device: torch.device) -> dist.ProcessGroup:
    """A process group for the rows of `ranks`, which all call this.

    gloo for CPU, else the default group's backend. All ranks must have made equally many groups before.
    """
    return dist.new_group(
        list(ranks),
        backend="gloo" if device.type == "cpu" else None,
        use_local_synchronization=True,
        pg_options=_hccl_options() if device.type == "npu" else None,
    )


def _hccl_options() -> Any:
    import torch_npu

    options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    options.hccl_config = {"hccl_buffer_size": _HCCL_BUFFER_MB}
    return options


class RowGather:
    """Gathers rows of `width` int64 from all ranks of `group`; one gather at a time.

    All ranks post equally often. `device`: an accelerator, or CPU (gloo). `where`: stage and rank, for
    errors. Owned by the scheduler thread.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        width: int,
        device: torch.device,
        counters: ChannelCounters,
        where: str,
        pinned: bool = True,
    ) -> None:
        self._group, self._counters, self.where = group, counters, where
        self._streams = DeviceStreams(device, pinned=pinned)
        self._stream = self._streams.new_stream()
        shape = (group.size(), width)
        self._row = torch.zeros(width, dtype=torch.int64, pin_memory=self._streams.pinned)
        self._rows = torch.zeros(shape, dtype=torch.int64, pin_memory=self._streams.pinned)
        self._cells = self._row.numpy()  # the same memory
        if self._streams.asynchronous:
            with self._streams.use(self._stream):
                self._row_there = torch.empty(width, dtype=torch.int64, device=device)
                self._rows_there = torch.empty(shape, dtype=torch.int64, device=device)
        self._arrival: Callable[[], Any] | None = None
        self.posted: tuple[int, ...] | None = None  # the row, until the rows of all ranks have been read

        self.last_wait_s = 0.0  # how long the last `wait` blocked

    @property
    def ranks(self) -> int:
        return self._rows.shape[0]

    @property
    def on_device(self) -> bool:
        return self._streams.asynchronous

    def warm_up(self) -> None:
        """Create the communicator and check every rank. Blocks until all ranks call it."""
        self._streams.make_way(1)
        self.post([self._group.rank()] * self._rows.shape[1])
        heard = self.wait()[:, 0].tolist()
        if heard != list(range(self.ranks)):
            raise PipelineError(
                f"{self.where}: the first gather among {self.ranks} ranks brought the rows of {heard}; "
                "report this, and set SGLANG_NPU_PP_DP_METADATA=host."
            )

    def post(self, row: Sequence[int]) -> None:
        """Start a gather with this rank's `row`, without waiting."""
        if self._arrival is not None:
            raise PipelineError(
                f"{self.where}: a row is posted before the rows of the last step were read; report this."
            )
        self._cells[:] = row  # its last copy has passed, since its gather has
        self.posted = tuple(row)
        self._counters.messages += 1
        self._counters.bytes += self._rows.nbytes
        self._arrival = self._post_on_device() if self._streams.asynchronous else self._post_on_host()

    def wait(self) -> torch.Tensor:
        """Rows of all ranks: int64, (ranks, width), on the host, valid until the next post.

        Raises PeerLostError for a lost rank.
        """
        if self._arrival is None:
            raise PipelineError(f"{self.where}: rows are read that were not posted; report this.")
        arrival, self._arrival = self._arrival, None
        began = time.monotonic()
        try:
            arrival()
        except RuntimeError as error:
            raise PeerLostError(
                f"{self.where}: another rank of this stage is gone, so the metadata of this step cannot be "
                f"gathered ({error}); its log says why."
            ) from error
        self.posted = None
        self.last_wait_s = time.monotonic() - began
        self._counters.waits += 1
        self._counters.wait_s += self.last_wait_s
        return self._rows

    def _post_on_host(self) -> Callable[[], Any]:
        work = _all_gather(self._rows.view(-1), self._row, group=self._group, async_op=True)
        return lambda: work.wait()

    def _post_on_device(self) -> Callable[[], Any]:
        pinned = self._streams.pinned
        with self._streams.use(self._stream):
            # Without pinned memory this blocks; the stream is empty, since its last gather was read.
            self._row_there.copy_(self._row, non_blocking=pinned)
            _all_gather(self._rows_there.view(-1), self._row_there, group=self._group)
            if not pinned:
                return self._fetch
            self._rows.copy_(self._rows_there, non_blocking=True)
            return self._streams.record().synchronize

    def _fetch(self) -> None:
        with self._streams.use(self._stream):
            self._rows.copy_(self._rows_there)  # waits for the gather
