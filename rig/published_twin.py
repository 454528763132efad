"""A tiny twin of the models that are served in stages on Ascend: DeepSeek-V3's layers, with random weights.

Multi-head latent attention, experts with a shared one, a first layer without, and one NEXTN (multi-token
prediction) layer behind the last. 0.8 MB in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rig.checkpoints import LAYER_SCALE, Weights, draft_input, write_checkpoint

SEED = 0
WIDTH, HEADS = 64, 4
QUERY_RANK, KEY_VALUE_RANK = 32, 32
POSITIONLESS, ROTARY, VALUE = 16, 8, 16  # of a head: width of its query and key without and with positions
INNER, EXPERT_INNER, EXPERTS, CHOSEN = 128, 32, 8, 2
VOCABULARY, CONTEXT = 512, 4096
LAYERS, DENSE_LAYERS = 4, 1


def write_twin(folder: Path, model: Path) -> Path:
    """The checkpoint, in `folder`, with the tokenizer of `model`."""
    generator = torch.Generator().manual_seed(SEED)
    embedding, head = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    weights: Weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": head,
    }
    for index in range(LAYERS + 1):
        weights.update(_layer(f"model.layers.{index}.", index >= DENSE_LAYERS, generator))
    weights.update(_draft(f"model.layers.{LAYERS}.", embedding, head, generator))
    write_checkpoint(folder, CONFIG, weights, model)
    return folder


def _draft(prefix: str, embedding: torch.Tensor, head: torch.Tensor, generator: torch.Generator) -> Weights:
    """What the NEXTN layer has beside a layer: it reads [embedding of a token, hidden state that said it]."""
    return {
        f"{prefix}eh_proj.weight": draft_input(WIDTH, generator),
        f"{prefix}enorm.weight": torch.ones(WIDTH),
        f"{prefix}hnorm.weight": torch.ones(WIDTH),
        f"{prefix}shared_head.norm.weight": torch.ones(WIDTH),
        f"{prefix}shared_head.head.weight": head.clone(),
        f"{prefix}embed_tokens.weight": embedding.clone(),
    }


def _layer(prefix: str, sparse: bool, generator: torch.Generator) -> Weights:
    found = {
        f"{prefix}input_layernorm.weight": torch.ones(WIDTH),
        f"{prefix}post_attention_layernorm.weight": torch.ones(WIDTH),
        f"{prefix}self_attn.q_a_layernorm.weight": torch.ones(QUERY_RANK),
        f"{prefix}self_attn.kv_a_layernorm.weight": torch.ones(KEY_VALUE_RANK),
    }
    for name, rows, columns, scale in (*_attention(), *(_experts() if sparse else _mlp("mlp", INNER))):
        matrix = torch.randn(rows, columns, generator=generator) * scale / columns**0.5
        found[f"{prefix}{name}.weight"] = matrix
    if sparse:
        found[f"{prefix}mlp.gate.e_score_correction_bias"] = torch.zeros(EXPERTS)
    return found


Shape = tuple[str, int, int, float]  # name, rows, columns, scale


def _attention() -> Iterator[Shape]:
    yield "self_attn.q_a_proj", QUERY_RANK, WIDTH, 1.0
    yield "self_attn.q_b_proj", HEADS * (POSITIONLESS + ROTARY), QUERY_RANK, 1.0
    yield "self_attn.kv_a_proj_with_mqa", KEY_VALUE_RANK + ROTARY, WIDTH, 1.0
    yield "self_attn.kv_b_proj", HEADS * (POSITIONLESS + VALUE), KEY_VALUE_RANK, 1.0
    yield "self_attn.o_proj", WIDTH, HEADS * VALUE, LAYER_SCALE


def _experts() -> Iterator[Shape]:
    yield "mlp.gate", EXPERTS, WIDTH, 1.0
    yield from _mlp("mlp.shared_experts", EXPERT_INNER)
    for index in range(EXPERTS):
        yield from _mlp(f"mlp.experts.{index}", EXPERT_INNER)


def _mlp(name: str, inner: int) -> Iterator[Shape]:
    yield f"{name}.gate_proj", inner, WIDTH, 1.0
    yield f"{name}.up_proj", inner, WIDTH, 1.0
    yield f"{name}.down_proj", WIDTH, inner, LAYER_SCALE


CONFIG: Mapping[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "moe_intermediate_size": EXPERT_INNER,
    "num_hidden_layers": LAYERS,
    "first_k_dense_replace": DENSE_LAYERS,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": QUERY_RANK,
    "kv_lora_rank": KEY_VALUE_RANK,
    "qk_nope_head_dim": POSITIONLESS,
    "qk_rope_head_dim": ROTARY,
    "v_head_dim": VALUE,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": CHOSEN,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": {  # as DeepSeek-V3's; SGLang's CPU path asks for one
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": CONTEXT // 4,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "attention_bias": False,
}
