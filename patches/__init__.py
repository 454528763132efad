"""The only room that knows SGLang's names: one module a seam, and the list of all patches."""

from __future__ import annotations

import json
from importlib import resources

from sglang_npu_pp.patching import Contracts, Patch

from . import (
    attention,
    bootstrap,
    control,
    disaggregation,
    dp_metadata,
    ending,
    flushes,
    groups,
    outputs,
    proxies,
    requests,
    startup,
)

ABSENT = "absent"  # in contracts.json, in the place of a fingerprint: the release does not have the function

PATCHES: tuple[Patch, ...] = (
    *startup.PATCHES,
    *groups.PATCHES,
    *requests.PATCHES,
    *control.PATCHES,
    *flushes.PATCHES,
    *proxies.PATCHES,
    *outputs.PATCHES,
    *attention.PATCHES,
    *dp_metadata.PATCHES,
    *bootstrap.PATCHES,
    *disaggregation.PATCHES,
    *ending.PATCHES,
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
    """What is known of each release, oldest first; the file is made by scripts/fingerprint.py."""
    data = json.loads(resources.files(__package__).joinpath("contracts.json").read_text())
    contracts: dict[str, dict[str, str | None]] = {release: {} for release in data["releases"]}
    for target, versions in data["functions"].items():
        for found, releases in versions.items():
            for release in releases:
                contracts[release][target] = None if found == ABSENT else found
    return contracts
