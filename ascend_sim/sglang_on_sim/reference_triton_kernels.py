"""Plain torch in the place of SGLang's own Triton kernels that Qwen3, Qwen3-VL or Qwen3-MoE launch on an NPU.

An Ascend machine compiles them with Triton for Ascend; the Triton that is installed here has no device. As
in `reference_kernels`, every operation goes through torch_npu onto the current stream. Parameters have the
names and the order of the kernel's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import reference_draft_kernels


def write_req_to_token_pool(
    req_to_token_ptr: Tensor,
    req_pool_indices: Tensor,
    prefix_tensors: Tensor,
    pre_lens: Tensor,
    seq_lens: Tensor,
    extend_lens: Tensor,
    out_cache_loc: Tensor,
    req_to_token_ptr_stride: int,
) -> None:
    """Write the slots of each request's tokens to its row: first those of its cached prefix, then new ones.

    req_to_token_ptr [rows, context]; for each of B requests its row, the address of the int64 slots of its
    prefix, the length of the prefix, all its tokens, its new tokens; out_cache_loc [new tokens of all].

    An address that only the device knows is followed on the device: the prefixes are gathered from a tensor
    that covers all addresses. Rows are written whole, behind each prefix and new token as they were.
    """
    column = torch.arange(req_to_token_ptr.shape[1], device=req_to_token_ptr.device)
    before, after = pre_lens.long().unsqueeze(1), seq_lens.long().unsqueeze(1)
    first_new = (extend_lens.long().cumsum(0) - extend_lens).unsqueeze(1)
    nth_new = (first_new + column - before).clamp(0, len(out_cache_loc) - 1)
    in_prefix, in_row = column < before, column < after
    # Where there is no prefix, an address that can be read.
    readable = torch.full_like(before, out_cache_loc.data_ptr())
    addresses = torch.where(in_prefix, prefix_tensors.view(torch.int64).unsqueeze(1) + 8 * column, readable)
    rows = req_to_token_ptr[req_pool_indices].long()
    rows = torch.where(in_row, out_cache_loc[nth_new].long(), rows)
    rows = torch.where(in_prefix, _all_memory(column.device)[addresses // 8 - 1], rows)
    req_to_token_ptr[req_pool_indices] = rows.to(req_to_token_ptr.dtype)


def compute_position(
    positions: Tensor,
    extend_start_loc: Tensor,
    extend_prefix_lens: Tensor,
    extend_seq_lens: Tensor,
    has_prefix: bool,
) -> None:
    """Number the new tokens of each request from the end of its prefix on: positions [new tokens of all];
    extend_start_loc [B] is where each request begins in it."""
    ends = extend_seq_lens.cumsum(0)
    begins = ends - extend_seq_lens
    token = torch.arange(len(positions), device=positions.device)
    request = torch.searchsorted(ends, token, right=True)
    first = extend_prefix_lens - begins if has_prefix else -begins
    positions.copy_(token + first[request])
    extend_start_loc.copy_(begins)


def apply_interleaved_rope(
    x_ptr: Tensor,
    out_ptr: Tensor,
    S: int,  # noqa: N803 - the kernel's own name
    D: int,  # noqa: N803
    stride_x_m: int,
    stride_x_s: int,
    stride_out_s: int,
    section_1_end: int,
    section_2_end: int,
    **blocks: int,
) -> None:
    """Choose one of three position axes for each column: 1 or 2 for every third column as long as the
    section of that axis lasts, otherwise 0. x_ptr [3, S, D], out_ptr [S, D]."""
    out_ptr.copy_(x_ptr[0])
    for axis, section_end in ((1, section_1_end), (2, section_2_end)):
        columns = slice(axis, 3 * section_end, 3)
        out_ptr[:, columns] = x_ptr[axis, :, columns]


def row_logsumexp(
    x_ptr: Tensor,
    out_max_ptr: Tensor,
    out_log_sum_ptr: Tensor,
    row_stride: int,
    col_stride: int,
    num_cols: int,
    **blocks: int,
) -> None:
    """`logsumexp` of each row in two terms: x_ptr [rows, columns] -> its maximum and the rest, [rows]."""
    values = x_ptr.float()
    out_max_ptr.copy_(values.amax(1))
    out_log_sum_ptr.copy_((values - values.amax(1, keepdim=True)).exp().sum(1).log())


def row_logsumexp_topk(
    x_ptr: Tensor,
    out_max_ptr: Tensor,
    out_log_sum_ptr: Tensor,
    out_top_vals_ptr: Tensor,
    out_top_idx_ptr: Tensor,
    row_stride: int,
    col_stride: int,
    num_cols: int,
    *,
    K: int,  # noqa: N803
    **blocks: int,
) -> None:
    """`row_logsumexp`, and the K largest values of each row with their columns, [rows, K]; of equal values
    the one in the lower column comes first."""
    row_logsumexp(x_ptr, out_max_ptr, out_log_sum_ptr, row_stride, col_stride, num_cols)
    values, columns = x_ptr.float().sort(dim=1, descending=True, stable=True)
    out_top_vals_ptr.copy_(values[:, :K])
    out_top_idx_ptr.copy_(columns[:, :K])


def memcpy(
    dst_ptr: Tensor,
    src_ptr: Tensor,
    offset_ptr: Tensor,
    sz_ptr: Tensor,
    offset_src: bool,
    chunk_size: int,
    BLOCK_SIZE: int,  # noqa: N803 - the kernel's own name
) -> None:
    """Copy `sz_ptr` rows (of `chunk_size` elements) from or to row `offset_ptr`; both numbers are on the
    device and stay there."""
    target, source = dst_ptr.view(-1, chunk_size), src_ptr.view(-1, chunk_size)
    row = torch.arange(len(target), device=target.device)
    wanted = row + offset_ptr if offset_src else row - offset_ptr
    copied = row < sz_ptr if offset_src else (wanted >= 0) & (wanted < sz_ptr)
    rows = source[wanted.clamp(0, len(source) - 1)]
    target.copy_(torch.where(copied.unsqueeze(1), rows, target))


TRITON_KERNELS: Mapping[str, Callable[..., None]] = {
    "write_req_to_token_pool_triton": write_req_to_token_pool,
    "compute_position_kernel": compute_position,
    "apply_interleaved_rope_kernel": apply_interleaved_rope,
    "memcpy_triton_kernel": memcpy,
    "_row_logsumexp_kernel": row_logsumexp,
    "_row_logsumexp_topk_kernel": row_logsumexp_topk,
    **reference_draft_kernels.TRITON_KERNELS,
}


def install() -> None:
    """Launch these in the place of Triton kernels; `triton.runtime.jit` is imported.

    A kernel that has no implementation here raises `RuntimeError` with its name when it is launched.
    """
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        reference = TRITON_KERNELS.get(name)
        if reference is None:
            raise RuntimeError(f"the Triton kernel {name} is not on the simulated Ascend")
        reference(*arguments, **options)

    JITFunction.run = run


def _all_memory(device: torch.device) -> Tensor:
    """The address space as int64, element n at address 8 (n + 1). The caller who passes an address keeps
    what lies there alive."""
    import torch_npu

    words = 2**44
    storage = torch_npu._C._construct_storage_from_data_pointer(8, device, 8 * words)
    return torch.empty(0, dtype=torch.int64, device=device).set_(storage, 0, (words,), (1,))
