"""Whether the installed SGLang is one that the patches know: a verdict for every feature and every patch.

Fingerprints are taken from the files, so SGLang is not imported. The server looks at the functions of its own
process, and so also sees what another plugin has replaced there.
"""

from __future__ import annotations

from ...builds import CORE, Known, Seam, read_build, unknown_targets
from ...errors import ContractError
from ...patches import installed, load_contracts, seams_for
from ...patching import Patch
from .findings import Finding, Level
from .versions import version_of


def check() -> list[Finding]:
    seams = seams_for("npu" if version_of("torch_npu") else None)
    try:
        build = read_build(installed.release(), seams, installed.fingerprint)
    except ContractError as error:
        return [Finding(Level.WRONG, "contract", str(error))]
    return verdicts(Known(build, seams, load_contracts()))


def verdicts(known: Known) -> list[Finding]:
    """A finding for the build, one for each feature, one for each patch."""
    return [
        _build(known),
        *(_feature(known, feature) for feature in known.features),
        *(_patch(known, seam, patch) for seam in known.seams for patch in seam.patches),
    ]


def _build(known: Known) -> Finding:
    if CORE not in known.missing:
        return Finding(Level.OK, "contract", known.sentence.replace("in force", "would be in force", 1))
    text = f"{known.refusal} SGLang stays as it is; with SGLANG_NPU_PP=require the server does not start."
    return Finding(Level.WRONG, "contract", text)


def _feature(known: Known, feature: str) -> Finding:
    if feature in known.missing:
        level = Level.WRONG if feature == CORE else Level.WARNING
        text = "not in force: a server that uses it stays upstream's, or does not start with require"
        return Finding(level, feature, f"{text} ({known.missing[feature]})")
    releases = known.releases_of(feature)
    return Finding(Level.OK, feature, f"as in {', '.join(releases)}")


def _patch(known: Known, seam: Seam, patch: Patch) -> Finding:
    name = patch.target.partition(":")[2]
    releases = known.releases[seam.name]
    release = releases[-1] if releases else known.nearest
    contract = known.contracts[release]
    different = unknown_targets(patch, contract, known.build)
    if different:
        return Finding(Level.WARNING, name, known.in_words(sorted(set(different))))
    if not patch.is_needed(contract):
        return Finding(Level.NOTE, name, f"{release} does not need this patch")
    checked = len(set(patch.checked_targets(contract)))
    text = f"as in {release} ({checked} {'function' if checked == 1 else 'functions'})"
    return Finding(Level.OK, name, text)
