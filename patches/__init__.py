"""The only room that knows SGLang's names: one module a seam, and the list of all patches."""

from __future__ import annotations

import json
from importlib import resources

from sglang_npu_pp.patching import Contracts, Patch

from . import attention, groups, outputs, proxies, requests, startup

PATCHES: tuple[Patch, ...] = (
    *startup.PATCHES,
    *groups.PATCHES,
    *requests.PATCHES,
    *proxies.PATCHES,
    *outputs.PATCHES,
    *attention.PATCHES,
)


def patches_here() -> tuple[Patch, ...]:
    """The patches for the device that SGLang serves on in this process."""
    from sglang.srt.utils import is_npu

    device = "npu" if is_npu() else None
    return tuple(patch for patch in PATCHES if patch.device in (None, device))


def sglang_release() -> str:
    """The release of the SGLang that is imported in this process."""
    from sglang.version import __version__

    return __version__


def load_contracts() -> Contracts:
    """Fingerprints of the upstream functions by release; made by scripts/fingerprint.py."""
    return json.loads(resources.files(__package__).joinpath("contracts.json").read_text())
