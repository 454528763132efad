"""The reference kernels against what they are said to compute, written down a second time, token by token.

On CPU tensors: what their operations do on the simulated device is the subject of `test_kernels`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from ascend_sim.sglang_on_sim import reference_cache_kernels as cache_kernels
from ascend_sim.sglang_on_sim import reference_kernels as kernels
from ascend_sim.sglang_on_sim import reference_moe_kernels as moe_kernels
from ascend_sim.sglang_on_sim import reference_triton_kernels as triton_kernels
from ascend_sim.sglang_on_sim.missing_packages import MissingPackage, is_missing

pytestmark = pytest.mark.thorough

PAGE = 4
HEADS, SHARED_HEADS, WIDTH = 4, 2, 8
SCALE = 0.3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_rms_norm() -> None:
    values, weight = torch.randn(5, 16), torch.rand(16)
    normalised, reciprocal = kernels.npu_rms_norm(values, weight, 1e-5)
    torch.testing.assert_close(normalised, functional.rms_norm(values, (16,), weight, 1e-5))
    torch.testing.assert_close(normalised, values * reciprocal * weight)


def test_add_rms_norm_returns_the_sum_last() -> None:
    values, residual, weight = torch.randn(5, 16), torch.randn(5, 16), torch.rand(16)
    normalised, _, total = kernels.npu_add_rms_norm(values, residual, weight, 1e-5)
    torch.testing.assert_close(total, values + residual)
    torch.testing.assert_close(normalised, functional.rms_norm(total, (16,), weight, 1e-5))


def test_swiglu() -> None:
    gate, up = torch.randn(5, 8), torch.randn(5, 8)
    found = kernels.npu_swiglu(torch.cat([gate, up], -1))
    torch.testing.assert_close(found, functional.silu(gate) * up)


def rotated(head: Tensor, angles: Tensor) -> Tensor:
    """As a multiplication of complex numbers, whose parts are in the two halves of a head."""
    first, second = head.chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], -1)


def test_rotary_mul() -> None:
    heads, angles = torch.randn(1, 5, HEADS, WIDTH), torch.randn(5, WIDTH // 2)
    cos, sin = (torch.cat([part, part], -1).view(1, 5, 1, WIDTH) for part in (angles.cos(), angles.sin()))
    torch.testing.assert_close(kernels.npu_rotary_mul(heads, cos, sin), rotated(heads, angles.unsqueeze(1)))


def test_mrope_of_one_axis() -> None:
    tokens, places = 5, 9
    angles, positions = torch.randn(places, WIDTH // 2), torch.tensor([3, 8, 0, 3, 1])
    cache = torch.cat([angles.cos(), angles.sin()], -1)
    states = torch.randn(tokens, HEADS * WIDTH), torch.randn(tokens, SHARED_HEADS * WIDTH)
    found = kernels.npu_mrope(positions, *states, cache, WIDTH, mrope_section=[0, 0, 0])
    for after, before in zip(found, states, strict=True):
        expected = rotated(before.view(tokens, -1, WIDTH), angles[positions].unsqueeze(1))
        torch.testing.assert_close(after, expected.view(before.shape))
    for form in ({"mrope_section": [1, 1, 2]}, {"rotary_mode": "interleave"}):
        with pytest.raises(NotImplementedError, match="npu_mrope"):
            kernels.npu_mrope(positions, *states, cache, WIDTH, **form)


def test_split_qkv_rmsnorm_rope() -> None:
    tokens, q_size, kv_size = 5, HEADS * WIDTH, SHARED_HEADS * WIDTH
    qkv, angles = torch.randn(tokens, q_size + 2 * kv_size), torch.randn(tokens, WIDTH // 2)
    weights = torch.rand(2, WIDTH)
    sin, cos = (torch.cat([part, part], -1).view(-1, 1, 1, WIDTH) for part in (angles.sin(), angles.cos()))
    q, k, v = kernels.split_qkv_rmsnorm_rope(
        qkv, sin, cos, q_size, kv_size, WIDTH, eps=1e-5, q_weight=weights[0], k_weight=weights[1]
    )
    parts = qkv.split([q_size, kv_size, kv_size], -1)
    for found, part, weight in zip((q, k), parts[:2], weights, strict=True):
        heads = functional.rms_norm(part.view(tokens, -1, WIDTH), (WIDTH,), weight, 1e-5)
        torch.testing.assert_close(found, rotated(heads, angles.unsqueeze(1)).view(part.shape))
    torch.testing.assert_close(v, parts[2])


class Cache:
    """Keys and values of some requests, in pages that lie in disorder; what no token owns is NaN."""

    def __init__(self, totals: Sequence[int]) -> None:
        self.totals = totals
        longest = max(-(-total // PAGE) for total in totals)
        pages = torch.randperm(longest * len(totals))
        self.block_table = pages.view(len(totals), longest).int()
        self.keys, self.values = torch.full((2, len(pages), PAGE, SHARED_HEADS, WIDTH), float("nan"))
        for request, total in enumerate(totals):
            for token in range(total):
                page = self.block_table[request, token // PAGE]
                self.keys[page, token % PAGE] = torch.randn(SHARED_HEADS, WIDTH)
                self.values[page, token % PAGE] = torch.randn(SHARED_HEADS, WIDTH)

    def of(self, request: int) -> tuple[Tensor, Tensor]:
        """[heads, tokens, width], each head repeated for the heads of the query that share it."""
        pages = self.block_table[request]
        parts = (cache[pages].flatten(0, 1)[: self.totals[request]] for cache in (self.keys, self.values))
        keys, values = (part.transpose(0, 1).repeat_interleave(HEADS // SHARED_HEADS, 0) for part in parts)
        return keys, values


def test_paged_attention() -> None:
    cache = Cache([9, 1, 4])
    query, out = torch.randn(3, HEADS, WIDTH), torch.empty(3, HEADS, WIDTH)
    kernels.npu_paged_attention(
        query=query,
        key_cache=cache.keys,
        value_cache=cache.values,
        num_heads=HEADS,
        num_kv_heads=SHARED_HEADS,
        scale_value=SCALE,
        block_table=cache.block_table,
        context_lens=torch.tensor(cache.totals, dtype=torch.int32),
        out=out,
    )
    for request in range(3):
        keys, values = cache.of(request)
        expected = functional.scaled_dot_product_attention(
            query[request].unsqueeze(1), keys, values, scale=SCALE
        )
        torch.testing.assert_close(out[request], expected.squeeze(1))


def test_flash_attention_with_query_lengths() -> None:
    new, cache = [3, 1, 5], Cache([9, 1, 5])
    query = torch.randn(sum(new), HEADS * WIDTH)
    out = torch.empty_like(query)
    kernels.npu_flash_attention_qlens(
        query=query,
        key_cache=cache.keys,
        value_cache=cache.values,
        mask=torch.empty(0),
        block_table=cache.block_table,
        seq_len=torch.tensor(new, dtype=torch.int32),
        context_lens=torch.tensor(cache.totals, dtype=torch.int32),
        scale_value=SCALE,
        num_heads=HEADS,
        num_kv_heads=SHARED_HEADS,
        out=out,
    )
    row = 0
    for request, count in enumerate(new):
        keys, values = cache.of(request)
        for seen in range(cache.totals[request] - count + 1, cache.totals[request] + 1):
            head = query[row].view(HEADS, 1, WIDTH)
            expected = functional.scaled_dot_product_attention(
                head, keys[:, :seen], values[:, :seen], scale=SCALE
            )
            torch.testing.assert_close(out[row], expected.flatten())
            row += 1


def test_reshape_and_cache() -> None:
    keys, values = torch.zeros(2, 3, PAGE, SHARED_HEADS, WIDTH)
    key, value = torch.randn(2, 2, SHARED_HEADS, WIDTH)
    slots = torch.tensor([2 * PAGE + 1, 3], dtype=torch.int32)
    kernels.npu_reshape_and_cache(key, value, keys, values, slots)
    torch.testing.assert_close(keys[2, 1], key[0])
    torch.testing.assert_close(values[0, 3], value[1])
    assert keys.count_nonzero() == key.numel()


def slots_one_by_one(
    prefixes: Sequence[int], totals: Sequence[int], last: Sequence[int], free: Iterator[int]
) -> Iterator[int]:
    for prefix, total, slot in zip(prefixes, totals, last, strict=True):
        for token in range(prefix, total):
            slot = next(free) * PAGE if token % PAGE == 0 else slot + 1
            yield slot


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 11)), min_size=1, max_size=5), st.randoms())
def test_allocate_extend(lengths: list[tuple[int, int]], shuffled: random.Random) -> None:
    prefixes, totals = [prefix for prefix, _ in lengths], [sum(pair) for pair in lengths]
    pages = shuffled.sample(range(1, 100), 90)
    last = [page * PAGE + (prefix - 1) % PAGE for page, prefix in zip(pages[:5], prefixes, strict=False)]
    before, after = (sum(-(-count // PAGE) for count in counts) for counts in (prefixes, totals))
    free = pages[5 : 5 + after - before]
    out = torch.empty(sum(totals) - sum(prefixes), dtype=torch.int64)
    given_lengths = (torch.tensor(part) for part in (prefixes, totals, last))
    kernels.AllocateExtend()[(len(lengths),)](
        *given_lengths, torch.tensor(free, dtype=torch.int64), out, 8, PAGE, 64
    )
    assert out.tolist() == list(slots_one_by_one(prefixes, totals, last, iter(free)))


def test_top_k_top_p() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 3).log()
    found = kernels.npu_top_k_top_p(logits, torch.tensor([1.0, 0.6, 1.0]), torch.tensor([4, 4, 1]))
    assert found.isfinite().tolist() == [[True] * 4, [True, True, False, False], [True, False, False, False]]
    torch.testing.assert_close(found[0], logits[0])


def test_token_bitmask() -> None:
    allowed = torch.rand(2, 70) < 0.5
    words = torch.zeros(2, 3, dtype=torch.int64)
    for row, token in allowed.nonzero().tolist():
        words[row, token // 32] += 1 << token % 32
    logits = torch.randn(2, 70)
    kernels.apply_token_bitmask(logits, words.to(torch.int32))
    assert torch.equal(logits.isfinite(), allowed)


def test_compute_position() -> None:
    prefixes, new = torch.tensor([5, 0, 7]), torch.tensor([2, 3, 1])
    positions, begins = torch.empty(6, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
    triton_kernels.compute_position(positions, begins, prefixes, new, has_prefix=True)
    assert positions.tolist() == [5, 6, 0, 1, 2, 7]
    assert begins.tolist() == [0, 2, 5]


def test_interleaved_rope() -> None:
    axes = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 2, 8)
    chosen = torch.empty(2, 8)
    triton_kernels.apply_interleaved_rope(axes, chosen, 2, 8, 0, 0, 8, 2, 1, BLOCK_S=64, BLOCK_SIZE=128)
    assert chosen[0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]


def test_row_logsumexp_and_the_largest_values() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, -2.0], [0.0, 0.0, 0.0, 0.0]])
    maximum, rest, top, columns = torch.empty(2), torch.empty(2), torch.empty(2, 3), torch.empty(2, 3)
    triton_kernels.row_logsumexp_topk(values, maximum, rest, top, columns, 4, 1, 4, K=3, K_PAD=4, BLOCK_N=4)
    torch.testing.assert_close(maximum + rest, values.logsumexp(1))
    assert top.tolist() == [[3, 3, 1], [0, 0, 0]]
    assert columns.tolist() == [[1, 2, 0], [0, 1, 2]]


@pytest.mark.parametrize("offset", [0, 2])
def test_memcpy_moves_rows_from_or_to_an_offset(offset: int) -> None:
    local, whole = torch.randn(4, 3), torch.randn(9, 3)
    place, count = torch.tensor(offset), torch.tensor(3)
    expected = whole.clone()
    expected[offset : offset + 3] = local[:3]
    gathered = whole.clone()
    triton_kernels.memcpy(gathered, local, place, count, False, 3, 8192)
    torch.testing.assert_close(gathered, expected)
    scattered = torch.zeros(4, 3)
    triton_kernels.memcpy(scattered, whole, place, count, True, 3, 8192)
    torch.testing.assert_close(scattered, torch.cat([whole[offset : offset + 3], torch.zeros(1, 3)]))


def test_whole_pages_are_copied_between_device_and_host() -> None:
    layers, page_size, shape = 2, 4, (2, 3)  # heads, width
    device = [torch.randn(layers, 5, page_size, *shape) for _ in range(2)]
    host = [torch.zeros(6, layers, page_size, *shape) for _ in range(2)]

    def copy(pages: dict[int, int], direction: cache_kernels.TransferDirection) -> None:
        on_device, on_host = (
            torch.cat([torch.arange(page * page_size, (page + 1) * page_size) for page in each])
            for each in (pages.keys(), pages.values())
        )
        cache_kernels.transfer_kv_dim_exchange(
            on_device, on_host, device[0], host[0], device[1], host[1], page_size, direction
        )

    copy({3: 0, 1: 5}, cache_kernels.TransferDirection.D2H)
    for here, there in zip(device, host, strict=True):
        assert torch.equal(there[0], here[:, 3])
        assert torch.equal(there[5], here[:, 1])
        assert not there[1:5].any()
    copy({2: 0}, cache_kernels.TransferDirection.H2D)
    for here, there in zip(device, host, strict=True):
        assert torch.equal(here[:, 2], there[0])


def test_experts_of_a_layer() -> None:
    """The four kernels one behind the other, against a loop over tokens and the experts they choose."""
    tokens, experts, chosen, width, inner = 6, 5, 2, 8, 12
    x, scores = torch.randn(tokens, width), torch.randn(tokens, experts)
    weights = torch.randn(experts, width, inner)
    factors, ids, places = moe_kernels.npu_moe_gating_top_k_softmax(scores, k=chosen)
    assert places.tolist() == [[token, tokens + token] for token in range(tokens)]
    factors = moe_kernels.l1_norm(factors)
    rows, index, counts, _ = moe_kernels.npu_moe_init_routing_v2(
        x,
        ids,
        active_num=tokens * chosen,
        expert_num=experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[0, experts],
        quant_mode=-1,
    )
    (made,) = moe_kernels.npu_grouped_matmul(
        x=[rows], weight=[weights], split_item=2, group_list_type=1, group_type=0, group_list=counts
    )
    found = moe_kernels.npu_moe_finalize_routing(made, None, None, None, factors, index, ids, drop_pad_mode=2)
    for token in range(tokens):
        best = scores[token].topk(chosen)
        shares = best.values.softmax(0)
        each = [share * (x[token] @ weights[e]) for share, e in zip(shares, best.indices, strict=True)]
        torch.testing.assert_close(found[token], torch.stack(each).sum(0))


def test_experts_refuse_what_they_do_not_do() -> None:
    x, weight, counts = torch.randn(3, 4), torch.randn(2, 4, 5), torch.tensor([1, 2])
    form: dict[str, Any] = {"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": counts}
    moe_kernels.npu_grouped_matmul([x], [weight], **form)
    for change in ({"bias": [x]}, {"group_list_type": 0}):
        with pytest.raises(NotImplementedError, match="npu_grouped_matmul"):
            moe_kernels.npu_grouped_matmul([x], [weight], **{**form, **change})


def test_what_is_missing_can_be_imported_and_says_its_name_when_it_is_called() -> None:
    missing = MissingPackage("sgl_kernel_npu.norm.fused_norm").fused_norm
    with pytest.raises(RuntimeError, match=r"sgl_kernel_npu\.norm\.fused_norm\.fused_norm is not on the sim"):
        missing(torch.ones(1))


def test_of_triton_only_what_ascend_adds_is_missing() -> None:
    assert is_missing("acl")
    assert is_missing("triton.language.extra.cann")
    assert is_missing("triton.language.extra.cann.libdevice")
    assert not is_missing("triton.language.extra")
    assert not is_missing("acl_of_another")


def test_what_has_a_reference_is_found_in_its_package() -> None:
    package = MissingPackage("sgl_kernel_npu.norm.split_qkv_rmsnorm_rope")
    assert package.split_qkv_rmsnorm_rope is kernels.split_qkv_rmsnorm_rope
