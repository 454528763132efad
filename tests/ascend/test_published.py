"""What SGLang's own parser and this package say to the command lines that are published for Ascend.

On the simulated Ascend, where SGLang takes `--device npu`. The model is a configuration of GLM-5's
architecture, without weights: nothing is served.
"""

from __future__ import annotations

import json

import pytest

from rig.harness import Here, Rank
from sglang_npu_pp.tools.published import PUBLISHED, Published

pytestmark = pytest.mark.thorough

GLM_5 = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 64,
    "vocab_size": 512,
    "max_position_embeddings": 202752,
}
CP_OF_A_STAGE = 4


def taken(here: Here, arguments: list[str]) -> tuple[str | None, dict[str, object]]:
    """Why this package leaves such a server to upstream, and what SGLang understood; an argument that its
    parser does not know raises ValueError."""
    from sglang.srt.server_args import prepare_server_args

    from sglang_npu_pp.patches.features import unsupported

    try:
        server_args = prepare_server_args(arguments)
    except SystemExit as error:
        raise ValueError(f"SGLang's parser refuses {' '.join(arguments)}") from error
    names = ("pp_size", "attn_cp_size", "enable_prefill_cp", "cp_strategy", "chunked_prefill_size")
    return unsupported(server_args), {name: getattr(server_args, name) for name in names}


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that the published lines get from what starts them."""
    folder = tmp_path_factory.mktemp("glm5")
    (folder / "config.json").write_text(json.dumps(GLM_5))
    return ["--model-path", str(folder), "--dist-init-addr", "127.0.0.1:5000"]


@pytest.mark.parametrize("line", PUBLISHED, ids=lambda line: line.name)
def test_the_patches_are_in_force_on_such_a_server(rank: Rank, line: Published, addresses: list[str]) -> None:
    why_not, understood = rank.call(taken, [*addresses, *line.for_0_5_21])
    assert why_not is None
    assert understood == {
        "pp_size": line.stages,
        "attn_cp_size": CP_OF_A_STAGE,
        "enable_prefill_cp": True,
        "cp_strategy": "zigzag",
        "chunked_prefill_size": line.chunk,
    }


@pytest.mark.parametrize("line", [line for line in PUBLISHED if line.renamed], ids=lambda line: line.name)
def test_a_line_with_earlier_names_is_refused_by_sglang(
    rank: Rank, line: Published, addresses: list[str]
) -> None:
    with pytest.raises(ValueError, match="SGLang's parser refuses"):
        rank.call(taken, [*addresses, *line.arguments])


def gathers_caches(here: Here) -> bool:
    from sglang.srt.models.deepseek_v2 import DeepseekV2AttentionMLA

    return hasattr(DeepseekV2AttentionMLA, "rebuild_cp_kv_cache")


def test_this_release_cannot_share_the_tokens_of_a_prompt_with_sparse_attention(rank: Rank) -> None:
    """Its attention on NPUs calls this. What is published is served with a later release
    (tests/server/test_published_lines.py); once this one has it, that can change."""
    assert not rank.call(gathers_caches)
