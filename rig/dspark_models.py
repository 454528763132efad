"""A tiny Qwen3 with random weights and a DSPARK draft for it.

On a prefill server the draft only turns hidden states of the target into its own keys and values. Of a Qwen3
SGLang takes them from layers of the last stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rig.checkpoints import Weights, write_checkpoint
from rig.upstream_models import (
    CONTEXT,
    HEAD_WIDTH,
    HEADS,
    KEY_VALUE_HEADS,
    LAYERS,
    SCALE,
    VOCABULARY,
    WIDTH,
    write_model,
)

SEED = 0
DRAFT_LAYERS, BLOCK, RANK = 2, 4, 8
LAST_STAGE = (1, 2)  # layers whose outputs the draft reads: SGLang takes each before the layer that follows


def write_models(folder: Path, tokenizer_of: Path) -> tuple[Path, Path]:
    """Target and draft."""
    draft = folder / "draft"
    target = write_model("qwen3", folder / "target", tokenizer_of)
    write_checkpoint(draft, _CONFIG, _weights(), tokenizer_of)
    return target, draft


def _weights() -> Weights:
    generator = torch.Generator().manual_seed(SEED)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * SCALE

    found = {
        "fc.weight": matrix(WIDTH, len(LAST_STAGE) * WIDTH),
        "hidden_norm.weight": torch.ones(WIDTH),
        "norm.weight": torch.ones(WIDTH),
        "markov_head.markov_w1.weight": matrix(VOCABULARY, RANK),
        "markov_head.markov_w2.weight": matrix(VOCABULARY, RANK),
    }
    query, key = HEADS * HEAD_WIDTH, KEY_VALUE_HEADS * HEAD_WIDTH
    for index in range(DRAFT_LAYERS):
        layer = f"layers.{index}."
        attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
        found |= {
            f"{layer}input_layernorm.weight": torch.ones(WIDTH),
            f"{layer}post_attention_layernorm.weight": torch.ones(WIDTH),
            f"{attention}q_proj.weight": matrix(query, WIDTH),
            f"{attention}k_proj.weight": matrix(key, WIDTH),
            f"{attention}v_proj.weight": matrix(key, WIDTH),
            f"{attention}o_proj.weight": matrix(WIDTH, query),
            f"{attention}q_norm.weight": torch.ones(HEAD_WIDTH),
            f"{attention}k_norm.weight": torch.ones(HEAD_WIDTH),
            f"{mlp}gate_proj.weight": matrix(2 * WIDTH, WIDTH),
            f"{mlp}up_proj.weight": matrix(2 * WIDTH, WIDTH),
            f"{mlp}down_proj.weight": matrix(WIDTH, 2 * WIDTH),
        }
    return found


_CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": DRAFT_LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": HEAD_WIDTH,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "num_target_layers": LAYERS,
    "block_size": BLOCK,
    "markov_rank": RANK,
    "markov_head_type": "vanilla",
    "enable_confidence_head": False,
    "dflash_config": {"target_layer_ids": list(LAST_STAGE), "mask_token_id": VOCABULARY - 1},
}
