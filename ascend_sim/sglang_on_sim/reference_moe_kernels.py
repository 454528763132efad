"""Plain torch implementations of the NPU kernels that SGLang calls for the experts of a Qwen3-MoE or GLM-5.

As in `reference_kernels`: what a kernel computes, from how SGLang calls it and from the public documentation
of torch_npu; every operation goes through torch_npu onto the current stream, and none waits for the device.

Shapes: tokens T, experts E, experts a token goes to K, widths N and M.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {5: torch.float16, 6: torch.float32, 15: torch.bfloat16}  # what a dtype is in an operator's `int`


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The K largest of the softmax of each row of x [T, E], the lower expert first of equal ones: weights,
    experts and places of the pairs where they lie expert choice by expert choice, [T, K] each."""
    if finished is not None:
        raise NotImplementedError("npu_moe_gating_top_k_softmax with finished rows on the simulated Ascend")
    weights, experts = x.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    tokens = x.shape[0]
    places = torch.arange(tokens * k, device=x.device, dtype=torch.int32).view(k, tokens).t().contiguous()
    return weights[:, :k].to(x.dtype), experts[:, :k].to(torch.int32), places


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    group_count: int = 1,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The K experts of each token with the largest `sigmoid(x) + bias`, the lower one first of equal ones,
    and their shares: of their sigmoids without the bias, times the factor; x [T, E] -> [T, K] twice.

    `k_group` and `group_select_mode` choose among groups of experts: there is one. For sigmoids `renorm` has
    no meaning. The last result belongs to `out_flag`.
    """
    unknown = given(options, known={"k_group", "group_select_mode", "renorm"}, plain={})
    if unknown or group_count != 1 or norm_type != 1:
        form = f"{group_count} groups, norm_type {norm_type}, {unknown}"
        raise NotImplementedError(f"npu_moe_gating_top_k in another form ({form}) on the simulated Ascend")
    sigmoids = x.float().sigmoid()
    ranked = sigmoids if bias is None else sigmoids + bias.float()
    experts = ranked.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    chosen = sigmoids.gather(1, experts)
    shares = chosen / (chosen.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return shares.to(x.dtype), experts.to(torch.int32), x.new_empty(0, dtype=torch.float32)


def l1_norm(weights: Tensor) -> Tensor:
    """Each row divided by its sum."""
    return weights / weights.sum(-1, keepdim=True)


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    active_expert_range: Sequence[int] = (),
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of x [T, N] once for each expert they go to, expert by expert: [T K, N].

    Also where the row for choice k of token t lies among them, at t K + k, and how many rows each expert
    has, [E]. The last result belongs to quantisation.
    """
    unknown = given(options, known={"active_num", "expert_tokens_num_flag"}, plain={"quant_mode": -1})
    if unknown or expert_tokens_num_type != 1 or list(active_expert_range) != [0, expert_num]:
        raise NotImplementedError(f"npu_moe_init_routing_v2 with {unknown} on the simulated Ascend")
    experts = expert_idx.reshape(-1)
    order = experts.argsort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    counts = (experts.unsqueeze(1) == torch.arange(expert_num, device=x.device)).sum(0)
    rows = x[order // expert_idx.shape[1]]
    return rows, places.to(torch.int32), counts, x.new_empty(0, dtype=torch.float32)


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
    **options: Any,
) -> list[Tensor]:
    """The rows of each expert times its weight: one x [rows, N], one weight [E, N, M], group_list [E] rows of
    each expert, one behind the other -> [rows, M]."""
    unknown = given(options, known=set(), plain={"act_type": 0})
    one_each = len(x) == len(weight) == 1 and group_list is not None
    if unknown or not one_each or (split_item, group_type, group_list_type) != (2, 0, 1):
        raise NotImplementedError(f"npu_grouped_matmul in another form ({unknown}) on the simulated Ascend")
    (rows,), (weights,) = x, weight
    assert group_list is not None
    expert = torch.searchsorted(
        group_list.cumsum(0), torch.arange(len(rows), device=rows.device), right=True
    ).unsqueeze(1)
    out = rows.new_zeros((rows.shape[0], weights.shape[2]), dtype=torch.float32)
    for number in range(weights.shape[0]):  # all rows for each of them: their counts stay on the device
        out = torch.where(expert == number, rows.float() @ weights[number].float(), out)
    return [out.to(rows.dtype if output_dtype is None else DTYPES[output_dtype])]


def npu_moe_finalize_routing(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """The sum of what the experts of each token made of it, weighted with scales [T, K]: [T, N].

    `drop_pad_mode` 2: the places of the rows are in the order of `npu_moe_init_routing_v2`.
    """
    if scales is None or drop_pad_mode != 2 or any(each is not None for each in (skip1, skip2, bias)):
        raise NotImplementedError("npu_moe_finalize_routing in another form on the simulated Ascend")
    rows = expanded_permuted_rows[expanded_src_to_dst_row.long()].float()
    weighted = rows.view(*scales.shape, -1) * scales.float().unsqueeze(-1)
    return weighted.sum(1).to(expanded_permuted_rows.dtype)


def given(options: Mapping[str, Any], known: set[str], plain: Mapping[str, Any]) -> list[str]:
    """Names of options that ask for something: not `known`, and not left out, empty or as in `plain`."""
    return sorted(
        name
        for name, value in options.items()
        if name not in known and (isinstance(value, Tensor) or (value and value != plain.get(name)))
    )


OPERATORS: tuple[Callable[..., Any], ...] = (
    npu_moe_gating_top_k_softmax,
    npu_moe_gating_top_k,
    npu_moe_init_routing_v2,
    npu_grouped_matmul,
    npu_moe_finalize_routing,
)

PACKAGE_KERNELS: Mapping[str, Any] = {"sgl_kernel_npu.norm.l1_norm.l1_norm": l1_norm}
