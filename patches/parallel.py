"""Sizes, ranks and groups of this process, as SGLang's `get_parallel()` names them: 0.5.13 has none."""

from __future__ import annotations

from typing import Any

_IN_PARALLEL_STATE = {
    "tp_size": "get_tensor_model_parallel_world_size",
    "tp_rank": "get_tensor_model_parallel_rank",
    "tp_group": "get_tp_group",
    "pp_size": "get_pipeline_model_parallel_world_size",
    "pp_rank": "get_pipeline_model_parallel_rank",
    "pp_group": "get_pp_group",
    "attn_tp_size": "get_attn_tensor_model_parallel_world_size",
    "attn_tp_rank": "get_attn_tensor_model_parallel_rank",
    "attn_cp_rank": "get_attn_context_model_parallel_rank",
}
"""As `get_parallel()` of 0.5.14 asks for them."""


class ParallelState:
    """Up to 0.5.13.post1: reads each of them where that release keeps it."""

    def __getattr__(self, name: str) -> Any:
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers import dp_attention

        if name == "attn_dp_size":
            return dp_attention.get_attention_dp_size()
        if name not in _IN_PARALLEL_STATE:
            raise AttributeError(name)
        return getattr(parallel_state, _IN_PARALLEL_STATE[name])()


def get_parallel() -> Any:
    try:
        from sglang.srt import runtime_context
    except ImportError:
        return ParallelState()
    return runtime_context.get_parallel()


def memory_settings() -> list[Any]:
    """Where 0.5.17 and later keep them; empty for earlier releases, which have them at the scheduler."""
    try:
        from sglang.srt import runtime_context
    except ImportError:
        return []
    return [runtime_context.get_memory()] if hasattr(runtime_context, "get_memory") else []
