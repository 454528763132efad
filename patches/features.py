"""What a server uses of this package, and what of that is in force for the SGLang of this process.

Patches are applied before the arguments of the server are known. So what is decided here is asked when a
scheduler starts, and in the launcher: a server that uses a feature whose functions are not known stays on
upstream's path, or does not start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_npu_pp.builds import CORE, Known
from sglang_npu_pp.certificates import identity

from . import speculation

ServerArgs = Any
"""SGLang's."""


@dataclass(frozen=True)
class Feature:
    """A part of this package that a server may do without."""

    name: str
    is_used: Callable[[ServerArgs], bool]
    means: str  # "is used by ...", for documents
    separable: bool = False  # with `auto`, a server that uses it is patched without it


def _has_stages(arguments: ServerArgs) -> bool:
    return bool(arguments.pp_size > 1)


def _is_disaggregated(arguments: ServerArgs) -> bool:
    """Or may become so: from 0.5.21 on a running server can change its role."""
    return arguments.disaggregation_mode != "null" or getattr(arguments, "enable_pd_role_switch", False)


def _transfers_kv(arguments: ServerArgs) -> bool:
    return _has_stages(arguments) and _is_disaggregated(arguments)


def _has_data_parallel_attention(arguments: ServerArgs) -> bool:
    return _has_stages(arguments) and bool(arguments.enable_dp_attention)


def _speculates(arguments: ServerArgs) -> bool:
    return _has_stages(arguments) and arguments.speculative_algorithm is not None


def _has_hierarchical_cache(arguments: ServerArgs) -> bool:
    return _has_stages(arguments) and bool(arguments.enable_hierarchical_cache)


def _has_adapters(arguments: ServerArgs) -> bool:
    return _has_stages(arguments) and bool(arguments.enable_lora or arguments.lora_paths)


def _prepares_ahead(arguments: ServerArgs) -> bool:
    """What else a server must not have is known when it runs: `ahead.can_prepare`, `forwards.waits_last`."""
    return _has_stages(arguments) and not _has_data_parallel_attention(arguments)


FEATURES = (
    Feature(CORE, _has_stages, "every server with stages"),
    Feature("LoRA", _has_adapters, "--enable-lora, --lora-paths"),
    Feature("NPU backend", _has_stages, "every server with stages on Ascend"),
    Feature("data-parallel attention", _has_data_parallel_attention, "--enable-dp-attention"),
    Feature("bootstrap", _is_disaggregated, "--disaggregation-mode, with one stage or more"),
    Feature("disaggregation", _transfers_kv, "--disaggregation-mode, with stages"),
    Feature("speculative decoding", _speculates, "--speculative-algorithm, with stages"),
    Feature("hierarchical cache", _has_hierarchical_cache, "--enable-hierarchical-cache, with stages"),
    Feature(
        "preparing ahead",
        _prepares_ahead,
        "stages, without data-parallel attention; when off, a forward is prepared when what it waits for has "
        "come",
        separable=True,
    ),
    Feature(
        "end of a server",
        _has_stages,
        "every server with stages; where it is not in force, SGLang ends a server that has lost a stage",
        separable=True,
    ),
)
_, LORA, NPU_BACKEND, DP_ATTENTION, BOOTSTRAP, DISAGGREGATION, SPECULATION, HIERARCHICAL_CACHE, AHEAD, END = (
    feature.name for feature in FEATURES
)

_known: Known | None = None


def set_known(known: Known | None) -> None:
    """What the plugin has found in this process."""
    global _known
    _known = known


def in_force() -> Mapping[str, bool]:
    """Of each feature that there is on this device."""
    return {} if _known is None else {name: name in _known.in_force for name in _known.features}


def in_use(arguments: ServerArgs) -> list[str]:
    """What a server uses of the features that are in force."""
    known = in_force()
    return [each.name for each in FEATURES if known.get(each.name) and each.is_used(arguments)]


def functions() -> str:
    """Equal on ranks whose SGLang has equal functions, as far as they matter here."""
    return "" if _known is None else _known.build.digest


def certificate() -> str:
    """Equal on ranks with equal certificates, or with none."""
    return identity(None if _known is None else _known.certificate)


def unsupported(arguments: ServerArgs) -> str | None:
    """Why this server stays on upstream's path; None if it does not. Equal on all ranks."""
    return speculation.refused(arguments) or unknown_to_a_server(arguments)


def unknown_to_a_server(arguments: ServerArgs, separable: bool = False) -> str | None:
    """Which features that this server uses are not in force, and why; None if there are none.

    `separable`: those that it can be patched without, in the place of those that it cannot.
    """
    if _known is None:
        return None
    found = [
        feature.name
        for feature in FEATURES
        if feature.name in _known.missing and feature.separable is separable and feature.is_used(arguments)
    ]
    return f"this SGLang is not known for {_known.why_not(found)}" if found else None
