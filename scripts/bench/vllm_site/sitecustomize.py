"""Loaded by every Python process of the vLLM competitor: `../vllm.py` puts this folder on its path."""

import sglang_cpu_compat  # noqa: F401
