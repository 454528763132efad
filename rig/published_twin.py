"""Tiny twins of the models that are served in stages on Ascend, with random weights, in float32.

All have multi-head latent attention, experts with a shared one, a first layer without, and one NEXTN
(multi-token prediction) layer behind the last.

DEEPSEEK_V3   dense attention; 1.9 MB
GLM_5_1       sparse attention (DSA): every layer has an indexer, which chooses 64 tokens; 2.1 MB
GLM_5_2       the same, but most layers take the tokens that were chosen in a layer before; 3.3 MB
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
INDEX_HEADS, INDEX_WIDTH, INDEX_TOKENS = 8, 32, 64
INNER, EXPERT_INNER, EXPERTS, CHOSEN = 128, 32, 8, 2
VOCABULARY, CONTEXT = 512, 4096

Config = Mapping[str, Any]


def write_twin(folder: Path, model: Path, config: Config | None = None) -> Path:
    """The checkpoint, in `folder`, with the tokenizer of `model`; without `config` DEEPSEEK_V3's."""
    config = config or DEEPSEEK_V3
    generator = torch.Generator().manual_seed(SEED)
    embedding, head = (torch.randn(VOCABULARY, WIDTH, generator=generator) for _ in range(2))
    weights: Weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": torch.ones(WIDTH),
        "lm_head.weight": head,
    }
    layers = config["num_hidden_layers"]
    for index in range(layers + 1):
        prefix = f"model.layers.{index}."
        weights.update(_layer(prefix, index >= config["first_k_dense_replace"], generator))
        if has_indexer(config, index):
            weights.update(_indexer(f"{prefix}self_attn.indexer.", generator))
    weights.update(_draft(f"model.layers.{layers}.", embedding, head, generator))
    write_checkpoint(folder, config, weights, model)
    return folder


def has_indexer(config: Config, layer: int) -> bool:
    """Whether the layer chooses tokens itself; the NEXTN layer, behind the last, always can."""
    if "index_topk" not in config:
        return False
    types = config.get("indexer_types", [])
    return layer >= len(types) or types[layer] == "full"


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


def _indexer(prefix: str, generator: torch.Generator) -> Weights:
    """The part of the attention that chooses tokens: queries from the rank that the heads share, one key and
    a weight for each of its heads from the hidden state."""
    shapes = (
        ("wq_b", INDEX_HEADS * INDEX_WIDTH, QUERY_RANK),
        ("wk", INDEX_WIDTH, WIDTH),
        ("weights_proj", INDEX_HEADS, WIDTH),
    )
    found = {
        f"{prefix}{name}.weight": torch.randn(rows, columns, generator=generator) / columns**0.5
        for name, rows, columns in shapes
    }
    for name, around in (("weight", 1.0), ("bias", 0.0)):
        noise = torch.randn(INDEX_WIDTH, generator=generator) / 10
        found[f"{prefix}k_norm.{name}"] = noise + around
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


_COMMON: Config = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "moe_intermediate_size": EXPERT_INNER,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
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
    "attention_bias": False,
}

DEEPSEEK_V3: Config = {
    **_COMMON,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
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
}

GLM_5_1: Config = {
    **_COMMON,
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "index_n_heads": INDEX_HEADS,
    "index_head_dim": INDEX_WIDTH,
    "index_topk": INDEX_TOKENS,
}

# As GLM-5.2's 78 layers begin: the indexers of three layers, then one in four.
_INDEXERS = ["full"] * 3 + ["shared"] * 3 + ["full"] + ["shared"]
GLM_5_2: Config = {
    **GLM_5_1,
    "num_hidden_layers": len(_INDEXERS),
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "indexer_types": _INDEXERS,
    "index_share_for_mtp_iteration": True,
}
