"""Stand-in for `sgl_kernel`, which has no CPU wheel: names can be imported, calling one raises, but for
the kernels of speculative decoding, which are there in plain torch.

Dense models call none of its kernels on CPU, but SGLang imports many of them at module level.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from cpu_reference_kernels import KERNELS, OPERATORS

# sglang.srt.models.qwen3_5 looks these up at import time, and the Qwen-VL processor imports it.
# Do not add convert_weight_packed: SGLang switches its AMX kernels on when it is defined.
OPERATORS_LOOKED_UP_AT_IMPORT = (
    "fused_sigmoid_mul_cpu",
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
)

# The schemas disappear with this object, so it lives as long as the module.
_library = torch.library.Library("sgl_kernel", "FRAGMENT")
for _operator in OPERATORS_LOOKED_UP_AT_IMPORT:
    _library.define(f"{_operator}(Tensor x) -> Tensor")
for _function, _schema in OPERATORS.items():
    _library.define(f"{_function.__name__}{_schema}")
    _library.impl(_function.__name__, _function, "CPU")


def __getattr__(name: str) -> Callable[..., object]:
    """A kernel in plain torch, or under any other public `name` a function that raises `RuntimeError`."""
    if name in KERNELS:
        return KERNELS[name]
    # Python and its tools probe for dunder names (__path__, __file__): those must stay absent.
    if name.startswith("__"):
        raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")

    def missing_kernel(*_args: object, **_kwargs: object) -> NoReturn:
        raise RuntimeError(
            f"sgl_kernel.{name} was called, but this environment has only a stand-in for "
            "sgl_kernel (scripts/cpu_compat): this model or option needs real kernels"
        )

    missing_kernel.__name__ = name
    return missing_kernel
