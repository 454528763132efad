"""A small collective over the process group that the engine has already made.

It carries the records of `endpoints.py`. Fixed-size byte tensors, no pickle: the engine's group has no
authentication of its own, so nothing that came over it is executed.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from ..errors import TransportError
from .host_lane import Exchange

RECORD_BYTES = 2048  # more than a record with 16 addresses needs; a fixed size makes one round enough
_LENGTH_BYTES = 2


def process_group_exchange(group: dist.ProcessGroup) -> Exchange:
    """An `Exchange` over a group of host tensors (gloo) whose rank order is the stage order."""

    def exchange(data: bytes) -> list[bytes]:
        if len(data) > RECORD_BYTES - _LENGTH_BYTES:
            raise TransportError(
                f"This rank's address record has {len(data)} bytes, more than {RECORD_BYTES}; "
                "set SGLANG_NPU_PP_IPC_DIR or SGLANG_NPU_PP_HOST to something shorter."
            )
        framed = len(data).to_bytes(_LENGTH_BYTES, "little") + data
        mine = torch.frombuffer(bytearray(framed.ljust(RECORD_BYTES, b"\0")), dtype=torch.uint8)
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        return [_unframe(tensor.numpy().tobytes()) for tensor in everyone]

    return exchange


def _unframe(framed: bytes) -> bytes:
    length = int.from_bytes(framed[:_LENGTH_BYTES], "little")
    return framed[_LENGTH_BYTES : _LENGTH_BYTES + length]
