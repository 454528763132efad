"""Unmodified SGLang `--device npu` on the simulated Ascend.

What a machine with Ascend hardware has and this one lacks, besides CANN itself:

startup/                     on PYTHONPATH of the server's processes: sitecustomize, the plugin entry point
import_hooks.py              acts when torch_npu is imported; finds the packages that are not installed
missing_packages.py          those packages: calling something in them raises `RuntimeError` with its name
reference_kernels.py         fused NPU kernels that the served models call, in plain torch
reference_moe_kernels.py     those of the experts of a Qwen3-MoE or GLM-5
reference_dsa_kernels.py     those of the sparse attention of DeepSeek-V3.2 and GLM-5
reference_triton_kernels.py  the same for SGLang's own Triton kernels
reference_draft_kernels.py   those that draft and verify drafts
transfer_engine.py           the engine that moves caches between a prefill and a decode server
start_check.py               a scheduler that did not really take the NPU path ends with one sentence

Results are those of the simulated Ascend: order, lifetimes, use of the interfaces. Not speed, and not the
numerics of the real kernels.
"""

from pathlib import Path

STARTUP = Path(__file__).parent / "startup"  # put it on PYTHONPATH of the server's processes
