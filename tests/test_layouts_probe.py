"""What the layouts probe puts in the place of kernels, against SGLang's own plain torch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe import fused_moe_native
from sglang.srt.layers.moe.topk import StandardTopKOutput

from rig.probes.layouts_probe import leave_out_experts_of_other_ranks

TOKENS, WIDTH, EXPERTS, RANKS = 5, 8, 4, 2
CONFIG = SimpleNamespace(
    apply_router_weight_on_input=False, activation="silu", gemm1_alpha=None, gemm1_clamp_limit=None
)


def test_the_experts_of_all_ranks_add_up_to_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens with both, one and none of their experts on a rank."""
    native = fused_moe_native.moe_forward_native
    monkeypatch.setattr(fused_moe_native, "moe_forward_native", native)  # restores it afterwards
    leave_out_experts_of_other_ranks()
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tokens, inner, outer = random(TOKENS, WIDTH), random(EXPERTS, 16, WIDTH), random(EXPERTS, WIDTH, WIDTH)
    weights = random(TOKENS, 2).abs()
    numbers = torch.tensor([[0, 1], [2, 3], [1, 3], [0, 2], [3, 1]], dtype=torch.int32)

    def layer(first: int, last: int) -> Any:
        return SimpleNamespace(w13_weight=inner[first:last], w2_weight=outer[first:last], num_experts=EXPERTS)

    def chosen(local: torch.Tensor) -> StandardTopKOutput:
        return StandardTopKOutput(weights, local, random(TOKENS, EXPERTS))

    each = EXPERTS // RANKS
    parts = []
    for first in range(0, EXPERTS, each):
        local = torch.where((numbers >= first) & (numbers < first + each), numbers - first, -1)
        parts.append(
            fused_moe_native.moe_forward_native(layer(first, first + each), tokens, chosen(local), CONFIG)
        )
    torch.testing.assert_close(sum(parts), native(layer(0, EXPERTS), tokens, chosen(numbers), CONFIG))
