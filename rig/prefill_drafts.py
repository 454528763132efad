"""What a prefill server that drafts with a NEXTN layer is started with, and the decode server behind it.

On CPU, over Mooncake's TCP; both serve the tiny twin of DeepSeek-V3 (rig/published_twin.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rig import disaggregated
from rig.speculation import NEXTN_STEPS, nextn_arguments

BACKEND = "intel_amx"  # of SGLang's for the CPU, the one that knows latent attention and drafts
ATTENTION = ("--prefill-attention-backend", BACKEND, "--decode-attention-backend", BACKEND)


def arguments(mode: str, bootstrap_port: int) -> tuple[str, ...]:
    """`mode`: one of `disaggregated.MODES`."""
    return (
        *disaggregated.arguments(mode, bootstrap_port),
        *ATTENTION,
        *nextn_arguments(NEXTN_STEPS[mode]),
    )


def environment(*more_probes: str, paths: Sequence[Path] = ()) -> dict[str, str]:
    return disaggregated.engine_environment("nextn_probe", *more_probes, paths=paths)
