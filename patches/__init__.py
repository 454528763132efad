"""All code that knows SGLang's names: one module a seam, and the list of all patches."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources

from sglang_npu_pp.builds import CORE, Seam
from sglang_npu_pp.patching import Contracts, Patch

from . import (
    ahead,
    attention,
    bootstrap,
    consensus_store,
    control,
    decisions,
    disaggregation,
    dp_metadata,
    ending,
    features,
    forwards,
    grammars,
    groups,
    hierarchical_cache,
    lora,
    npu_graphs,
    outputs,
    prefill,
    proxies,
    queue_order,
    requests,
    speculation,
    startup,
    time_limits,
)
from .pipeline import has_pipeline, is_ours

ABSENT = "absent"  # in contracts.json, in the place of a fingerprint: the release does not have the function


def _only(when: Callable[..., bool], patches: tuple[Patch, ...]) -> tuple[Patch, ...]:
    return tuple(replace(patch, when=when) for patch in patches)


# On a server that stays on upstream's path every call is the original's. Startup decides whether it does; the
# launcher goes by the arguments of the server.
SEAMS: tuple[Seam, ...] = (
    Seam("startup", CORE, startup.PATCHES),
    Seam("groups", CORE, groups.PATCHES),  # each looks whether its group has lanes
    Seam("requests", CORE, _only(has_pipeline, requests.PATCHES)),
    Seam("decisions", CORE, _only(has_pipeline, decisions.PATCHES)),
    Seam(
        "control",
        CORE,
        (*_only(has_pipeline, control.PATCHES), *_only(is_ours, control.CLIENT_PATCHES)),
    ),
    Seam("time_limits", CORE, _only(has_pipeline, time_limits.PATCHES)),
    Seam("grammars", CORE, _only(has_pipeline, grammars.PATCHES)),
    Seam("lora", features.LORA, _only(has_pipeline, lora.PATCHES)),
    Seam("queue_order", CORE, _only(has_pipeline, queue_order.PATCHES)),
    Seam("proxies", CORE, _only(has_pipeline, proxies.PATCHES)),
    Seam("outputs", CORE, _only(has_pipeline, outputs.PATCHES)),
    Seam("attention", features.NPU_BACKEND, _only(has_pipeline, attention.PATCHES)),
    Seam("npu_graphs", features.NPU_BACKEND, _only(has_pipeline, npu_graphs.PATCHES)),
    Seam("prefill", features.NPU_BACKEND, _only(has_pipeline, prefill.PATCHES)),
    Seam("dp_metadata", features.DP_ATTENTION, _only(has_pipeline, dp_metadata.PATCHES)),
    Seam("bootstrap", features.BOOTSTRAP, _only(is_ours, bootstrap.PATCHES)),
    Seam("disaggregation", features.DISAGGREGATION, _only(has_pipeline, disaggregation.PATCHES)),
    Seam(
        "consensus_store",
        features.DISAGGREGATION,
        _only(has_pipeline, consensus_store.PATCHES),
    ),
    Seam("speculation", features.SPECULATION, _only(has_pipeline, speculation.PATCHES)),
    Seam(
        "hierarchical_cache",
        features.HIERARCHICAL_CACHE,
        _only(has_pipeline, hierarchical_cache.PATCHES),
    ),
    Seam("ahead", features.AHEAD, _only(has_pipeline, ahead.PATCHES)),
    Seam("forwards", features.AHEAD, _only(has_pipeline, forwards.PATCHES)),
    Seam("ending", features.END, ending.PATCHES),
)
PATCHES: tuple[Patch, ...] = tuple(patch for seam in SEAMS for patch in seam.patches)


def seams_for(device: str | None) -> tuple[Seam, ...]:
    """Seams of a device: "npu", or None for any other."""
    return tuple(seam for seam in SEAMS if all(patch.device in (None, device) for patch in seam.patches))


def seams_here() -> tuple[Seam, ...]:
    """For the device of this process's SGLang."""
    from sglang.srt.utils import is_npu

    return seams_for("npu" if is_npu() else None)


def sglang_release() -> str:
    """Release of the SGLang imported in this process."""
    from sglang.version import __version__

    return __version__


def load_contracts() -> Contracts:
    """Contracts by release, oldest first, as written by scripts/fingerprint.py."""
    data = json.loads(resources.files(__package__).joinpath("contracts.json").read_text())
    contracts: dict[str, dict[str, str | None]] = {release: {} for release in data["releases"]}
    for target, versions in data["functions"].items():
        for found, releases in versions.items():
            for release in releases:
                contracts[release][target] = None if found == ABSENT else found
    return contracts
