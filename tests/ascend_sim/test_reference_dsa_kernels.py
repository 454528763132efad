"""The reference kernels of sparse attention against their formulas, written a second time, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ascend_sim.sglang_on_sim import reference_dsa_kernels as kernels
from ascend_sim.sglang_on_sim import reference_moe_kernels as moe_kernels

pytestmark = pytest.mark.thorough

PAGE, CHOSEN, SCALE = 4, 3, 0.3
HEADS, LATENT, ROTARY, INDEX_HEADS, INDEX_WIDTH = 4, 8, 2, 3, 6
NEW, TOTALS = (3, 1, 5), (9, 1, 5)  # tokens of three requests: those of this forward, and all
PADDING = 2  # rows behind the last request


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Cache:
    """Rows of some requests, in pages that lie in disorder; what no token owns is NaN."""

    def __init__(self, *widths: int) -> None:
        longest = max(-(-total // PAGE) for total in TOTALS)
        pages = torch.randperm(longest * len(TOTALS))
        self.block_table = pages.view(len(TOTALS), longest).int()
        self.parts = [torch.full((len(pages), PAGE, 1, width), float("nan")) for width in widths]
        for request, total in enumerate(TOTALS):
            for token in range(total):
                page = self.block_table[request, token // PAGE]
                for part in self.parts:
                    part[page, token % PAGE, 0] = torch.randn(part.shape[-1])

    def of(self, request: int, part: int = 0) -> Tensor:
        """[tokens, width]"""
        return self.parts[part][self.block_table[request]].flatten(0, 2)[: TOTALS[request]]

    def form(self, lengths: str) -> dict[str, Any]:
        """What both kernels are told of the requests."""
        return {
            "actual_seq_lengths_query": torch.tensor(NEW).cumsum(0).int(),
            lengths: torch.tensor(TOTALS, dtype=torch.int32),
            "block_table": self.block_table,
            "layout_query": "TND",
            "sparse_mode": 3,
        }


def tokens() -> list[tuple[int, int]]:
    """Of each row of a query its request and its position."""
    return [
        (request, position)
        for request, (new, total) in enumerate(zip(NEW, TOTALS, strict=True))
        for position in range(total - new, total)
    ]


def indexed(cache: Cache, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = sum(NEW) + PADDING
    query, weights = torch.randn(rows, INDEX_HEADS, INDEX_WIDTH), torch.randn(rows, INDEX_HEADS)
    form = {
        **cache.form("actual_seq_lengths_key"),
        "layout_key": "PA_BSND",
        "sparse_count": CHOSEN,
        **changes,
    }
    found, _ = kernels.npu_lightning_indexer(query, cache.parts[0], weights, **form)
    return query, weights, found.squeeze(1)


def test_lightning_indexer_chooses_the_best_up_to_a_token() -> None:
    cache = Cache(INDEX_WIDTH)
    query, weights, found = indexed(cache)
    for row, (request, position) in enumerate(tokens()):
        scores = [
            sum(w * max(0.0, float(q @ k)) for w, q in zip(weights[row], query[row], strict=True))
            for k in cache.of(request)[: position + 1]
        ]
        best = sorted(range(len(scores)), key=lambda place: -scores[place])[:CHOSEN]
        assert found[row].tolist() == best + [-1] * (CHOSEN - len(best))
    assert found[sum(NEW) :].eq(-1).all()


def test_of_equal_scores_the_lower_position_comes_first() -> None:
    """Where no head agrees with a key its score is 0."""
    cache = Cache(INDEX_WIDTH)
    cache.parts[0].nan_to_num_(0).fill_(0)
    _, _, found = indexed(cache)
    assert found[2].tolist() == [0, 1, 2]


def attended(cache: Cache, chosen: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    rows = sum(NEW) + PADDING
    query = torch.randn(rows, HEADS, LATENT + ROTARY)
    form = {
        **cache.form("actual_seq_lengths_kv"),
        "layout_kv": "PA_BSND",
        "attention_mode": 2,
        "query_rope": query[..., LATENT:],
        "key_rope": cache.parts[1],
        **changes,
    }
    latent = cache.parts[0]
    found, _, _ = kernels.npu_sparse_flash_attention(
        query[..., :LATENT], latent, latent, chosen.unsqueeze(1).int(), SCALE, **form
    )
    return query, found


def test_sparse_attention_to_what_was_chosen() -> None:
    cache = Cache(LATENT, ROTARY)
    chosen = torch.full((sum(NEW) + PADDING, CHOSEN), -1)
    for row, (_, position) in enumerate(tokens()):
        places = torch.randperm(position + 1)[:CHOSEN]
        chosen[row, : len(places)] = places
    query, found = attended(cache, chosen)
    for row, (request, _) in enumerate(tokens()):
        places = chosen[row][chosen[row] >= 0]
        values = cache.of(request)[places]
        keys = torch.cat([values, cache.of(request, 1)[places]], -1)
        expected = (SCALE * query[row] @ keys.t()).softmax(-1) @ values
        torch.testing.assert_close(found[row], expected)
    assert not found[sum(NEW) :].any()


def test_sparse_attention_does_not_see_what_comes_after_a_token() -> None:
    cache = Cache(LATENT, ROTARY)
    chosen = torch.full((sum(NEW) + PADDING, CHOSEN), -1)
    chosen[:, 0] = 0
    torch.manual_seed(1)
    _, alone = attended(cache, chosen)
    chosen[0, 1] = TOTALS[0] - 1  # the first row is the third last token
    torch.manual_seed(1)
    _, found = attended(cache, chosen)
    torch.testing.assert_close(found, alone)


def test_split_and_norm() -> None:
    fused = torch.randn(5, 6 + LATENT + ROTARY)
    q_norm, norm = (SimpleNamespace(weight=torch.rand(width)) for width in (6, LATENT))
    q, latent, rotary = kernels.fused_split_qk_norm(fused, q_norm, norm, 6, LATENT, ROTARY, eps=1e-5)
    parts = fused.split([6, LATENT, ROTARY], -1)
    torch.testing.assert_close(q, functional.rms_norm(parts[0], (6,), q_norm.weight, 1e-5))
    expected = functional.rms_norm(parts[1], (LATENT,), norm.weight, 1e-5)
    torch.testing.assert_close(latent, expected.unsqueeze(1))
    torch.testing.assert_close(rotary, parts[2].unsqueeze(1))


@pytest.mark.parametrize("halves", [True, False])
def test_rotation_of_queries_and_keys(halves: bool) -> None:
    """As a multiplication of complex numbers; what is not turned stays."""
    width, angles = 4, torch.randn(5, 2)
    query, key = torch.randn(5, HEADS, 6), torch.randn(5, 1, 6)
    cos_sin = torch.cat([angles.cos(), angles.sin()], -1)
    turned = kernels.fused_rope_qk_mqa(query, key, cos_sin, width, halves)
    for heads, found in zip((query, key), turned, strict=True):
        pairs = heads[..., :width].unflatten(-1, (2, 2))
        pairs = pairs.transpose(-1, -2) if halves else pairs
        numbers = torch.view_as_complex(pairs.contiguous()) * torch.polar(
            torch.ones(5, 1, 2), angles[:, None]
        )
        back = torch.view_as_real(numbers)
        expected = (back.transpose(-1, -2) if halves else back).flatten(-2)
        torch.testing.assert_close(found, torch.cat([expected, heads[..., width:]], -1))


def test_products_of_heads_with_their_matrices() -> None:
    rows, matrices = torch.randn(5, HEADS, 6), torch.randn(HEADS, 6, 7)
    expected = torch.einsum("thn,hnm->thm", rows, matrices)
    swap = (1, 0, 2)
    found = kernels.npu_transpose_batchmatmul(rows, matrices, perm_x1=swap, perm_x2=(0, 1, 2), perm_y=swap)
    torch.testing.assert_close(found, expected)
    out = torch.empty(5, HEADS, 7)
    kernels.batch_matmul_transpose(rows, matrices, out)
    torch.testing.assert_close(out, expected)


def test_rows_are_scattered() -> None:
    rows, updates = torch.zeros(6, 1, 3), torch.randn(2, 1, 3)
    kernels.npu_scatter_nd_update_(rows, torch.tensor([[4], [1]]), updates)
    torch.testing.assert_close(rows[[4, 1]], updates)
    assert rows.count_nonzero() == updates.numel()


def test_experts_are_chosen_with_the_bias_and_weighted_without() -> None:
    scores, bias = torch.randn(6, 5), torch.randn(5)
    shares, experts, _ = moe_kernels.npu_moe_gating_top_k(
        scores, 2, bias=bias, norm_type=1, routed_scaling_factor=2.5, renorm=1
    )
    for token in range(6):
        sigmoids = scores[token].sigmoid()
        best = (sigmoids + bias).topk(2).indices
        assert experts[token].tolist() == best.tolist()
        torch.testing.assert_close(shares[token], 2.5 * sigmoids[best] / sigmoids[best].sum())


def nothing_chosen(**changes: Any) -> Callable[[], object]:
    chosen = torch.full((sum(NEW) + PADDING, CHOSEN), -1)
    return lambda: attended(Cache(LATENT, ROTARY), chosen, **changes)


REFUSED: Sequence[tuple[str, Callable[[], object]]] = (
    ("npu_lightning_indexer", lambda: indexed(Cache(INDEX_WIDTH), sparse_mode=0)),
    ("npu_lightning_indexer", lambda: indexed(Cache(INDEX_WIDTH), layout_key="BSND")),
    ("npu_lightning_indexer", lambda: indexed(Cache(INDEX_WIDTH), return_value=True)),
    ("npu_sparse_flash_attention", nothing_chosen(attention_mode=0)),
    ("npu_sparse_flash_attention", nothing_chosen(sparse_block_size=2)),
    ("npu_sparse_flash_attention", nothing_chosen(sinks=torch.zeros(HEADS))),
    (
        "npu_transpose_batchmatmul",
        lambda: kernels.npu_transpose_batchmatmul(*torch.zeros(2, 1, 1, 1), bias=torch.zeros(1)),
    ),
    ("npu_scatter_nd_update_", lambda: kernels.npu_scatter_nd_update_(*torch.zeros(3, 2, 2))),
    ("npu_moe_gating_top_k", lambda: moe_kernels.npu_moe_gating_top_k(torch.zeros(2, 4), 1, norm_type=0)),
    (
        "npu_moe_gating_top_k",
        lambda: moe_kernels.npu_moe_gating_top_k(torch.zeros(2, 4), 1, norm_type=1, group_count=2),
    ),
)


@pytest.mark.parametrize(("name", "call"), REFUSED)
def test_other_forms_are_refused_by_name(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(NotImplementedError, match=name):
        call()
