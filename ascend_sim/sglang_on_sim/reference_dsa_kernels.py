"""Plain torch implementations of the NPU kernels that SGLang calls for multi-head latent attention with DSA,
the sparse attention of DeepSeek-V3.2 and GLM-5.

As in `reference_kernels`: what a kernel computes, from how SGLang calls it and from the public documentation
of torch_npu and sgl-kernel-npu; every operation goes through torch_npu onto the current stream, and none
waits for the device, where the lengths of the requests are too. The real ones know few head widths (512, 64
and 128); these take any.

Shapes: tokens T, requests B, heads H, heads of the indexer N, chosen tokens K, pages P of S slots, widths of
the latent C, of its rotary part R, of the indexer D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference_moe_kernels import given

TOKENS_IN_A_ROW, PAGES = "TND", "PA_BSND"  # layouts of queries and of the cache
LOWER_RIGHT_CAUSAL = 3  # sparse_mode: the last query of a request sees all of its keys
UNLIMITED = 2**63 - 1
ABSORBED = 2  # attention_mode: keys are the latent and its rotary part, values the latent


# --- which tokens a token attends to --------------------------------------------------------------


def npu_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = LOWER_RIGHT_CAUSAL,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """For each token the K positions up to its own with the largest `sum over heads of w relu(q k)`, the
    largest first and the lower position first of equal ones; -1 behind the last where there are fewer.

    query [T, N, D], the requests one behind the other; key [P, S, 1, D]; weights [T, N]; lengths [B]: of the
    queries, summed up, and of the keys; block_table [B, pages of the longest request] -> [T, 1, K] int32.
    With context parallelism SGLang makes each token a request. The second result belongs to `return_value`.
    """
    _refuse_other_forms("npu_lightning_indexer", layout_query, layout_key, sparse_mode, options)
    owner, position = _places(len(query), actual_seq_lengths_query, actual_seq_lengths_key)
    assert block_table is not None
    slots = torch.arange(block_table.shape[1] * key.shape[1], device=query.device)
    everywhere = slots.expand(len(query), -1)
    keys = key.flatten(0, 2)[_rows(block_table, owner, everywhere, key.shape[1])].float()
    similar = torch.relu(query.float() @ keys.transpose(1, 2))
    scores = (similar * weights.float().unsqueeze(-1)).sum(1)
    seen = slots <= position.unsqueeze(1)
    best, order = scores.masked_fill(~seen, float("-inf")).sort(dim=-1, descending=True, stable=True)
    chosen = order.masked_fill(best == float("-inf"), -1)[:, :sparse_count]
    missing = max(0, sparse_count - chosen.shape[1])
    chosen = torch.nn.functional.pad(chosen, (0, missing), value=-1)
    return chosen.to(torch.int32).unsqueeze(1), query.new_empty(0)


def npu_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = LOWER_RIGHT_CAUSAL,
    attention_mode: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each token to the tokens that were chosen for it, in the space of the latent.

    query [T, H, C] and query_rope [T, H, R], the requests one behind the other; key [P, S, 1, C], the values
    too, and key_rope [P, S, 1, R]; sparse_indices [T, 1, K], positions in the request, -1 for none; lengths
    and block_table as of the indexer -> [T, H, C]. The other results belong to `return_softmax_lse`.
    """
    _refuse_other_forms("npu_sparse_flash_attention", layout_query, layout_kv, sparse_mode, options)
    if sparse_block_size != 1 or attention_mode != ABSORBED or query_rope is None or key_rope is None:
        raise NotImplementedError("npu_sparse_flash_attention in another form on the simulated Ascend")
    owner, position = _places(len(query), actual_seq_lengths_query, actual_seq_lengths_kv)
    assert block_table is not None
    chosen = sparse_indices.squeeze(1).long()
    allowed = (chosen >= 0) & (chosen <= position.unsqueeze(1))
    slot = _rows(block_table, owner, chosen.clamp(min=0), key.shape[1])
    latent, rotary = (cache.flatten(0, 2)[slot].float() for cache in (key, key_rope))
    # What is not chosen has weight 0, and 0 times what lies there must be 0.
    latent = latent.masked_fill(~allowed.unsqueeze(-1), 0)
    scores = query.float() @ latent.transpose(1, 2) + query_rope.float() @ rotary.transpose(1, 2)
    hidden = ~allowed.unsqueeze(1)
    shares = (scores * scale_value).masked_fill(hidden, float("-inf")).softmax(-1).masked_fill(hidden, 0)
    nothing = query.new_empty(0)
    return (shares @ latent).to(query.dtype), nothing, nothing


def _places(tokens: int, query_ends: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each token its request, B for rows behind the last one, and its position in it, -1 for those."""
    assert query_ends is not None
    assert lengths is not None
    ends, totals = query_ends.long(), lengths.long()
    token = torch.arange(tokens, device=ends.device)
    owner = torch.searchsorted(ends, token, right=True)
    known = owner.clamp(max=len(ends) - 1)
    position = totals[known] - ends[known] + token
    return owner, position.masked_fill(owner == len(ends), -1)


def _rows(block_table: Tensor, owner: Tensor, columns: Tensor, page_size: int) -> Tensor:
    """Where positions of each token's request lie in the cache; columns, positions [T, any]."""
    columns = columns.clamp(max=block_table.shape[1] * page_size - 1)
    request = owner.clamp(max=len(block_table) - 1).unsqueeze(1)
    return block_table.long()[request, columns // page_size] * page_size + columns % page_size


def _refuse_other_forms(
    name: str, layout_query: str, layout_key: str, sparse_mode: int, options: Mapping[str, Any]
) -> None:
    unlimited = {"pre_tokens": UNLIMITED, "next_tokens": UNLIMITED}
    unknown = given(options, known=set(), plain=unlimited)
    layouts = (layout_query, layout_key)
    if unknown or layouts != (TOKENS_IN_A_ROW, PAGES) or sparse_mode != LOWER_RIGHT_CAUSAL:
        form = f"{layouts}, sparse_mode {sparse_mode}, {unknown}"
        raise NotImplementedError(f"{name} in another form ({form}) on the simulated Ascend")


# --- around it ------------------------------------------------------------------------------------


def fused_split_qk_norm(
    fused: Tensor,
    q_norm: Any,
    k_norm: Any,
    q_rank: int,
    latent_width: int,
    rotary_width: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of the first projection, normalise the query and the latent.

    fused [T, q_rank + C + R]; the norms are modules with a weight -> [T, q_rank], [T, 1, C], [T, 1, R].
    """
    if any(getattr(norm, "bias", None) is not None for norm in (q_norm, k_norm)):
        raise NotImplementedError("fused_split_qk_norm with a bias on the simulated Ascend")
    q, latent, rotary = fused.split([q_rank, latent_width, rotary_width], -1)
    q, latent = (_rms_norm(part, norm.weight, eps) for part, norm in ((q, q_norm), (latent, k_norm)))
    return q, latent.unsqueeze(1), rotary.contiguous().unsqueeze(1)


def _rms_norm(values: Tensor, weight: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(values.float().square().mean(-1, keepdim=True) + eps)
    return (values.float() * scale * weight.float()).to(values.dtype)


def fused_rope_qk_mqa(
    query: Tensor, key: Tensor, cos_sin: Tensor, rotary_width: int, is_neox_style: bool
) -> tuple[Tensor, Tensor]:
    """Rotate the first columns of every head of query and key [T, heads, width], the rest stays.

    cos_sin [T, R] of the tokens, cosines in its first half. Pairs lie in the two halves of R (neox), or
    beside each other; they stay where they are.
    """
    cos, sin = (part.unsqueeze(1) for part in cos_sin.float().chunk(2, -1))

    def rotated(heads: Tensor) -> Tensor:
        turned, rest = heads[..., :rotary_width].float(), heads[..., rotary_width:]
        pairs = turned.unflatten(-1, (2, -1) if is_neox_style else (-1, 2))
        first, second = pairs.unbind(-2 if is_neox_style else -1)
        parts = (first * cos - second * sin, second * cos + first * sin)
        together = torch.stack(parts, -2 if is_neox_style else -1).flatten(-2)
        return torch.cat([together.to(heads.dtype), rest], -1)

    return rotated(query), rotated(key)


def npu_transpose_batchmatmul(
    input: Tensor,
    weight: Tensor,
    *,
    perm_x1: Sequence[int] | None = None,
    perm_x2: Sequence[int] | None = None,
    perm_y: Sequence[int] | None = None,
    **options: Any,
) -> Tensor:
    """`input weight`, matrix by matrix, the three dimensions of each permuted before and of the product
    behind."""
    if unknown := given(options, known=set(), plain={"batch_split_factor": 1}):
        raise NotImplementedError(f"npu_transpose_batchmatmul with {unknown} on the simulated Ascend")
    plain = (0, 1, 2)
    product = input.permute(tuple(perm_x1 or plain)) @ weight.permute(tuple(perm_x2 or plain))
    return product.permute(tuple(perm_y or plain)).contiguous()


def batch_matmul_transpose(tensor_a: Tensor, tensor_b: Tensor, tensor_c: Tensor) -> None:
    """Each head of a [T, H, N] times its own matrix of b [H, N, M], into c [T, H, M]."""
    tensor_c.copy_((tensor_a.transpose(0, 1) @ tensor_b).transpose(0, 1))


def npu_scatter_nd_update_(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Rows of `input` become those of `updates`; indices [rows, 1]."""
    if indices.shape[-1] != 1:
        raise NotImplementedError("npu_scatter_nd_update_ of more than rows on the simulated Ascend")
    return input.index_copy_(0, indices.view(-1).long(), updates.view(-1, *input.shape[1:]))


# --- where they go --------------------------------------------------------------------------------

OPERATORS: tuple[Callable[..., Any], ...] = (
    npu_lightning_indexer,
    npu_sparse_flash_attention,
    npu_transpose_batchmatmul,
    npu_scatter_nd_update_,
)

# Operators that sgl_kernel_npu registers when it is imported, by their schemas.
ADDED_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "batch_matmul_transpose(Tensor tensor_a, Tensor tensor_b, Tensor(a!) tensor_c) -> ()": (
        batch_matmul_transpose
    ),
}

PACKAGE_KERNELS: Mapping[str, Any] = {
    "sgl_kernel_npu.norm.fused_split_qk_norm.fused_split_qk_norm": fused_split_qk_norm,
    "sgl_kernel_npu.norm.fused_rope_qk_mqa.fused_rope_qk_mqa": fused_rope_qk_mqa,
}
