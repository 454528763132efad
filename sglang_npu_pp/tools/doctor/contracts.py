"""Compatibility of the installed SGLang with each patch.

From fingerprints of files, without importing SGLang; the server also detects other plugins in its process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...errors import ContractError
from ...patches import PATCHES, installed, load_contracts
from ...patching import Contract, Contracts, Misfit, Patch, Why, known_contract, misfit
from .findings import Finding, Level
from .versions import version_of

Read = Callable[[str], str | None]
"""Fingerprint of a target in the installed SGLang, None if it does not have it."""


def check() -> list[Finding]:
    try:
        release = installed.release()
    except ContractError as error:
        return [Finding(Level.WRONG, "contract", str(error))]
    device = "npu" if version_of("torch_npu") else None
    here = [patch for patch in PATCHES if patch.device in (None, device)]
    return verdicts(here, release, load_contracts(), installed.fingerprint)


def verdicts(patches: Sequence[Patch], release: str, contracts: Contracts, read: Read) -> list[Finding]:
    """A finding for each of `patches`, after one for all."""
    try:
        contract = known_contract(release, contracts)
    except ContractError as error:
        text = f"{error} SGLang stays as it is; with SGLANG_NPU_PP=require the server does not start."
        return [Finding(Level.WRONG, "contract", text)]
    each = [_verdict(patch, release, contract, read) for patch in patches]
    bad = sum(finding.level is Level.WRONG for finding in each)
    if bad:
        text = f"{bad} patches do not fit, so none is applied; install SGLang {release} again, unchanged."
        return [Finding(Level.WRONG, "contract", text), *each]
    needed = sum(finding.level is Level.OK for finding in each)
    return [Finding(Level.OK, "contract", f"{needed} patches would be in force for SGLang {release}"), *each]


def _verdict(patch: Patch, release: str, contract: Contract, read: Read) -> Finding:
    name = patch.target.partition(":")[2]
    found = misfit(patch, contract, lambda target, known: read(target) == known)
    if found is not None:
        return Finding(Level.WRONG, name, _sentence(found, release))
    if not patch.is_needed(contract):
        return Finding(Level.NOTE, name, f"{release} does not need this patch")
    checked = len(set(patch.checked_targets(contract)))
    return Finding(
        Level.OK, name, f"as in {release} ({checked} {'function' if checked == 1 else 'functions'})"
    )


def _sentence(found: Misfit, release: str) -> str:
    if found.why is Why.PRESENT:
        return "this SGLang already has the function that we would add"
    if found.why is Why.ABSENT:
        return "this SGLang does not have the function that we would replace"
    verb = "differs" if len(found.targets) == 1 else "differ"
    return f"{', '.join(found.targets)} {verb} from SGLang {release}"
