"""Plain torch implementations of the fused NPU kernels that SGLang calls for a dense Qwen3 or Qwen3-VL.

For tests only. They say what a kernel computes, from how SGLang calls it and from the public documentation
of torch_npu and CANN; nothing about the precision or the speed of the real one. All arithmetic inside is
float32.

Every operation in them goes through torch_npu and runs on the current stream, so a kernel here keeps its
place among copies, events and transfers as a real one does. No kernel waits for the device: lengths come
as tensors or lists on the host, as they do in the real calls.

Shapes: tokens T, requests B, heads H, heads of keys and values G (H is a multiple of G), head width D,
pages P of S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import (
    reference_cache_kernels,
    reference_draft_kernels,
    reference_dsa_kernels,
    reference_moe_kernels,
)

# --- normalisation and activation ----------------------------------------------------------------


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`input / rms(input) * gamma` over the last dimension, and 1 / rms: [..., N] -> [..., N], [..., 1]."""
    values = input.float()
    reciprocal = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return (values * reciprocal * gamma.float()).to(input.dtype), reciprocal


def npu_add_rms_norm(
    x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """`npu_rms_norm(x1 + x2)`; the sum, the new residual, is the third result."""
    residual = x1 + x2
    normalised, reciprocal = npu_rms_norm(residual, gamma, epsilon)
    return normalised, reciprocal, residual


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`silu(first half) * second half` along `dim`: [..., 2 N] -> [..., N]."""
    gate, up = input.chunk(2, dim)
    return torch.nn.functional.silu(gate) * up


# --- rotary embedding ----------------------------------------------------------------------------


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """`input * cos + rotated(input) * sin`, where `rotated` is (-second half, first half) of a head.

    input [1, T, H, D]; r1 (cosine) and r2 (sine) broadcast against it, each half repeated: [1, T, 1, D].
    """
    if rotary_mode != "half" or rotate is not None:
        raise NotImplementedError(f"npu_rotary_mul with rotary_mode {rotary_mode!r} on the simulated Ascend")
    first, second = input.float().chunk(2, -1)
    rotated = torch.cat([-second, first], -1)
    return (input.float() * r1.float() + rotated * r2.float()).to(input.dtype)


def npu_mrope(
    positions: Tensor,
    query: Tensor,
    key: Tensor,
    cos_sin_cache: Tensor,
    head_size: int,
    *,
    mrope_section: list[int] | None = None,
    rotary_mode: str | None = "half",
    cache_mode: str | None = "default",
) -> tuple[Tensor, Tensor]:
    """`npu_rotary_mul` of queries and keys, by position; of one axis only.

    positions [T]; query [T, heads x head_size], key likewise; cos_sin_cache [positions, head_size]: cosines,
    then sines, of half a head each.
    """
    form = (any(mrope_section or []), rotary_mode, cache_mode, cos_sin_cache.shape[-1])
    if form != (False, "half", "default", head_size):
        raise NotImplementedError(f"npu_mrope of form {form} on the simulated Ascend")
    cosines, sines = (
        torch.cat([half, half], -1).unsqueeze(1) for half in cos_sin_cache[positions].chunk(2, -1)
    )

    def rotated(states: Tensor) -> Tensor:
        return npu_rotary_mul(states.unflatten(1, (-1, head_size)), cosines, sines).flatten(1)

    return rotated(query), rotated(key)


def split_qkv_rmsnorm_rope(
    qkv: Tensor,
    sin: Tensor,
    cos: Tensor,
    q_size: int,
    kv_size: int,
    head_dim: int,
    eps: float | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the output of the projection, normalise every head of q and k, rotate them.

    qkv [T, (H + 2 G) D]; sin, cos [T, 1, 1, D]; weights [D] -> q [T, H D], k [T, G D], v [T, G D].
    """
    if q_bias is not None or k_bias is not None:
        raise NotImplementedError("split_qkv_rmsnorm_rope with a bias on the simulated Ascend")

    def normalise_and_rotate(part: Tensor, weight: Tensor | None) -> Tensor:
        heads = part.view(1, len(part), -1, head_dim)
        if weight is not None:
            assert eps is not None
            heads, _ = npu_rms_norm(heads, weight, eps)
        rotated = npu_rotary_mul(heads, cos.view(1, -1, 1, head_dim), sin.view(1, -1, 1, head_dim))
        return rotated.view(part.shape)

    q, k, v = (part.contiguous() for part in qkv.split([q_size, kv_size, kv_size], -1))
    return normalise_and_rotate(q, q_weight), normalise_and_rotate(k, k_weight), v


# --- attention without graphs; that of graphs is in cann/aten_attention.cpp -----------------------


def _attend(query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * query keys^T) values`, each head of keys and values for H / G heads of the query.

    query [B, Q, H, D], keys and values [B, K, G, D]; allowed, None for all, broadcasts to [B, H, Q, K].
    """
    share = query.shape[2] // keys.shape[2]
    q = query.transpose(1, 2).float()
    k, v = (part.transpose(1, 2).float().repeat_interleave(share, 1) for part in (keys, values))
    scores = torch.matmul(q, k.transpose(2, 3)) * scale
    if allowed is not None:
        scores = scores.masked_fill(allowed.logical_not(), float("-inf"))
    return torch.matmul(scores.softmax(-1), v).transpose(1, 2).to(query.dtype)


def npu_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    workspace: Tensor | None = None,
) -> None:
    """Attention of one new token a request over its pages of the cache.

    query, out [B, H, D]; caches [P, S, G, D]; block_table [B, pages of the longest request], page numbers;
    context_lens [B] on the host, the new tokens included.
    """
    width = query.shape[-1]
    keys, values = (cache[block_table].flatten(1, 2) for cache in (key_cache, value_cache))
    slots = torch.arange(keys.shape[1], device=query.device)
    in_use = slots < _to_device(context_lens, query.device).unsqueeze(1)
    # What lies behind the end of a request has weight 0, and 0 times what lies there must be 0.
    values = values.masked_fill(in_use.logical_not()[:, :, None, None], 0)
    attended = _attend(
        query.view(-1, 1, num_heads, width), keys, values, in_use[:, None, None, :], scale_value
    )
    out.view(-1, num_heads, width).copy_(attended.squeeze(1))


def npu_flash_attention_qlens(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    mask: Tensor,
    seq_len: Tensor,
    context_lens: Tensor,
    scale_value: float,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor,
) -> None:
    """Causal attention of the last tokens of each request over its pages of the cache.

    query, out [T, H D], the requests one behind the other; caches [P, S, G, D]; block_table [B, pages of the
    longest request]; seq_len [B], new tokens of each request, and context_lens [B], all its tokens, on the
    host. `mask` is a tile of the causal mask, which is computed from the lengths here.
    """
    begin = 0
    for request, (new, total) in enumerate(zip(seq_len.tolist(), context_lens.tolist(), strict=True)):
        rows = slice(begin, begin + new)
        begin += new
        pages = block_table[request, : -(-total // key_cache.shape[1])]
        keys, values = (cache[pages].flatten(0, 1)[:total].unsqueeze(0) for cache in (key_cache, value_cache))
        tokens = torch.arange(total, device=query.device)
        causal = tokens <= tokens[total - new :, None]
        attended = _attend(query[rows].view(1, new, num_heads, -1), keys, values, causal, scale_value)
        out[rows].copy_(attended.reshape(new, -1))


# --- cache of keys and values --------------------------------------------------------------------


def npu_reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    """Write the keys and values of new tokens to their slots.

    key, value [T, G, D]; caches [P, S, G, D]; slot_indices [T], slot s being row s % S of page s // S.
    """
    for source, cache in ((key, key_cache), (value, value_cache)):
        cache.flatten(0, 1).index_copy_(0, slot_indices.long(), source.view(-1, *cache.shape[2:]))


class AllocateExtend:
    """`alloc_extend_kernel`, which is launched on a grid as Triton kernels are: `kernel[grid](...)`."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return allocate_extend


def allocate_extend(
    prefix_lens: Tensor,
    seq_lens: Tensor,
    last_loc: Tensor,
    free_pages: Tensor,
    out_indices: Tensor,
    requests_rounded_up: int,
    page_size: int,
    tokens_rounded_up: int,
) -> None:
    """Give every new token a slot: first the rest of its request's last page, then new pages in order.

    prefix_lens, seq_lens, last_loc [B]: tokens with a slot, tokens in all, slot of the last token that has
    one; free_pages [F], of which the requests take what they need from the front; out_indices [T].
    """
    extends = seq_lens - prefix_lens
    ends = extends.cumsum(0)
    token = torch.arange(len(out_indices), device=out_indices.device)
    request = torch.searchsorted(ends, token, right=True)
    position = prefix_lens[request] + token - (ends - extends)[request]

    pages_before, pages_after = (-(-lengths // page_size) for lengths in (prefix_lens, seq_lens))
    new_pages = pages_after - pages_before
    first_new_page = new_pages.cumsum(0) - new_pages
    nth_new_page = position // page_size - pages_before[request]
    in_last_page = last_loc[request] + 1 + position - prefix_lens[request]
    if len(free_pages) == 0:
        out_indices.copy_(in_last_page)
        return
    page = free_pages[(first_new_page[request] + nth_new_page).clamp(0, len(free_pages) - 1)]
    in_new_page = page * page_size + position % page_size
    out_indices.copy_(torch.where(nth_new_page < 0, in_last_page, in_new_page))


# --- sampling ------------------------------------------------------------------------------------


def npu_top_k_top_p(logits: Tensor, p: Tensor | None = None, k: Tensor | None = None) -> Tensor:
    """Put -inf where a token is not among the `k` most likely, nor among the most likely whose
    probabilities reach `p` together. logits [B, vocabulary], p and k [B]."""
    ordered, order = logits.float().sort(-1, descending=True)
    dropped = torch.zeros_like(ordered, dtype=torch.bool)
    if k is not None:
        dropped = torch.arange(ordered.shape[1], device=logits.device) >= k.unsqueeze(1)
    if p is not None:
        probabilities = ordered.masked_fill(dropped, float("-inf")).softmax(-1)
        dropped = dropped | (probabilities.cumsum(-1) - probabilities > p.unsqueeze(1))
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), float("-inf"))


def apply_token_bitmask(logits: Tensor, bitmask: Tensor) -> None:
    """Put -inf, in place, where a grammar forbids a token.

    logits [B, vocabulary]; bitmask [B, vocabulary / 32 rounded up] int32: bit t % 32 of word t // 32
    allows token t.
    """
    bits = torch.arange(32, device=bitmask.device, dtype=torch.int32)
    allowed = torch.bitwise_right_shift(bitmask.unsqueeze(-1), bits).bitwise_and(1).flatten(1)
    logits.masked_fill_(allowed[:, : logits.shape[1]] == 0, float("-inf"))


# --- where they go -------------------------------------------------------------------------------

# Operators of torch_npu, which checks the arguments against its own schema before they arrive here.
OPERATORS = (
    npu_rms_norm,
    npu_add_rms_norm,
    npu_swiglu,
    npu_rotary_mul,
    npu_mrope,
    npu_top_k_top_p,
    *reference_moe_kernels.OPERATORS,
    *reference_dsa_kernels.OPERATORS,
)

# Operators that sgl_kernel_npu registers when it is imported, by their schemas.
ADDED_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "apply_token_bitmask(Tensor(a!) logits, Tensor bitmask) -> ()": apply_token_bitmask,
    **reference_dsa_kernels.ADDED_OPERATORS,
    **reference_draft_kernels.ADDED_OPERATORS,
}

# Functions that torch_npu loads from Ascend's transformer library (ATB); SGLang calls them by name.
ATB_FUNCTIONS: Mapping[str, Callable[..., None]] = {
    "_npu_reshape_and_cache": npu_reshape_and_cache,
    "_npu_flash_attention_qlens": npu_flash_attention_qlens,
    "_npu_paged_attention": npu_paged_attention,
}

# Functions of packages that are not installed here.
PACKAGE_KERNELS: Mapping[str, Any] = {
    "sgl_kernel_npu.norm.split_qkv_rmsnorm_rope.split_qkv_rmsnorm_rope": split_qkv_rmsnorm_rope,
    "sgl_kernel_npu.mem_cache.allocator.alloc_extend_kernel": AllocateExtend(),
    **reference_cache_kernels.PACKAGE_KERNELS,
    **reference_moe_kernels.PACKAGE_KERNELS,
    **reference_dsa_kernels.PACKAGE_KERNELS,
    **reference_draft_kernels.PACKAGE_KERNELS,
}


def install() -> None:
    """Put all of them in force in this process; torch_npu is imported."""
    import torch_npu

    operators = torch.library.Library("npu", "IMPL")
    for operator in OPERATORS:
        operators.impl(operator.__name__, operator, "PrivateUse1", allow_override=True)
    additions = torch.library.Library("npu", "FRAGMENT")
    for schema, operator in ADDED_OPERATORS.items():
        additions.define(schema)
        additions.impl(operator.__name__, operator, "PrivateUse1")
    _libraries.extend([operators, additions])
    for name, function in ATB_FUNCTIONS.items():
        setattr(torch_npu, name, function)


_libraries: list[torch.library.Library] = []  # implementations disappear with these objects


def _to_device(lengths: Tensor, device: torch.device) -> Tensor:
    """Lengths from the host without waiting: an unpinned tensor would block until its copy has run."""
    if device.type == "cpu":
        return lengths
    return lengths.pin_memory().to(device, non_blocking=True)
