"""The kernel of sgl_kernel_npu between the KV pool and its host pool (`--enable-hierarchical-cache`), in
plain torch; see reference_kernels.py.

Shapes: layers L, pages P on the device, pages Q on the host, S slots a page, heads of keys G, head width D.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class TransferDirection(enum.IntEnum):
    H2D = 1
    D2H = 2


def transfer_kv_dim_exchange(
    device_indices: Tensor,
    host_indices: Tensor,
    device_k: Tensor,
    host_k: Tensor,
    device_v: Tensor,
    host_v: Tensor,
    page_size: int,
    direction: TransferDirection,
) -> None:
    """Copy whole pages: [L, P, S, G, D] on the device, [Q, L, S, G, D] on the host.

    Indices, on the host, name the slots of the pages one by one. On the current stream; the host memory is
    pinned, so the host waits for no copy.
    """
    pages = zip(
        (device_indices[::page_size] // page_size).tolist(),
        (host_indices[::page_size] // page_size).tolist(),
        strict=True,
    )
    for device_page, host_page in pages:
        for device, host in ((device_k, host_k), (device_v, host_v)):
            here, there = device[:, device_page], host[host_page]
            if direction == TransferDirection.D2H:
                there.copy_(here.reshape(there.shape), non_blocking=True)
            else:
                here.copy_(there.reshape(here.shape), non_blocking=True)


PACKAGE_KERNELS: Mapping[str, Any] = {
    "sgl_kernel_npu.kvcacheio.TransferDirection": TransferDirection,
    "sgl_kernel_npu.kvcacheio.transfer_kv_dim_exchange": transfer_kv_dim_exchange,
}
