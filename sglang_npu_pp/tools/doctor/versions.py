"""Installed versions (SGLang, this plugin, torch, torch_npu, CANN); would SGLang load the plugin?"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import sglang_npu_pp

from ... import certificates
from ...builds import CORE, Known, Seam, read_build, unknown_targets
from ...errors import ContractError
from ...patches import installed, load_contracts, seams_for
from ...patching import Patch
from ...settings import Settings
from ..imports import asked_apart
from .findings import Finding, Level

DEVICE_LIMIT_S = 120  # torch_npu may take a minute to load on a machine that has just started
_COUNT_DEVICES = "import torch, torch_npu; print('devices', torch.npu.device_count())"
TESTED_PYTHONS: Mapping[str, tuple[Level, str]] = {
    "3.11": (Level.OK, ""),
    "3.12": (Level.NOTE, "; on {} sglang-npu-pp was tested without a server"),
}
_OTHER_PYTHON = (Level.WARNING, "; on {} sglang-npu-pp was not tested, use Python 3.11 or 3.12.")
_CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_CANN_DEFAULT = "/usr/local/Ascend/ascend-toolkit/latest"


def check(environ: Mapping[str, str]) -> list[Finding]:
    findings = [
        python(platform.python_version(), sys.executable),
        _sglang(),
        Finding(Level.OK, "sglang-npu-pp", sglang_npu_pp.__version__),
        *_plugins(environ),
        _package("torch", Level.WRONG, "install the one that your SGLang asks for"),
    ]
    if version_of("torch_npu") is None:
        text = "not installed: this machine serves on CPU or GPU"
        return [*findings, Finding(Level.NOTE, "torch_npu", text)]
    return [*findings, _torch_npu(), _cann(environ)]


def python(version: str, executable: str) -> Finding:
    """How far sglang-npu-pp was tested with this Python."""
    minor = ".".join(version.split(".")[:2])
    level, remark = TESTED_PYTHONS.get(minor, _OTHER_PYTHON)
    return Finding(level, "Python", f"{version} at {executable}{remark.format(minor)}")


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package(name: str, missing: Level, advice: str) -> Finding:
    found = version_of(name)
    return Finding(Level.OK, name, found) if found else Finding(missing, name, f"is not installed; {advice}.")


def _sglang() -> Finding:
    try:
        return Finding(Level.OK, "SGLang", f"{installed.release()} at {installed.folder()}")
    except ContractError as error:
        return Finding(Level.WRONG, "SGLang", str(error))


def _plugins(environ: Mapping[str, str]) -> list[Finding]:
    """Whether SGLang would load this package, and which others."""
    names = {point.name for point in metadata.entry_points(group=installed.PLUGIN_GROUP)}
    only = {name.strip() for name in environ.get(installed.ONLY_PLUGINS, "").split(",") if name.strip()}
    mine = sglang_npu_pp.__name__
    if mine not in names:
        finding = Finding(
            Level.WRONG,
            "plugin",
            "SGLang would not find it: this Python has no such entry point; run pip install --no-deps . in "
            "the directory of sglang-npu-pp.",
        )
    elif only and mine not in only:
        finding = Finding(
            Level.WRONG,
            "plugin",
            f"{installed.ONLY_PLUGINS}={environ[installed.ONLY_PLUGINS]} does not name {mine}, so SGLang "
            "does not load it; add it there.",
        )
    else:
        finding = Finding(Level.OK, "plugin", "SGLang finds its entry point")
    others = sorted((names & only if only else names) - {mine})
    if not others:
        return [finding]
    return [finding, Finding(Level.NOTE, "other plugins", f"{', '.join(others)} are loaded, too")]


def _torch_npu() -> Finding:
    """Loaded in a process of its own: that fails or hangs with a broken CANN or driver."""
    version = version_of("torch_npu")
    try:
        devices = asked_apart(_COUNT_DEVICES, r"devices (\d+)", os.environ, DEVICE_LIMIT_S)
    except subprocess.TimeoutExpired:
        return Finding(
            Level.WRONG, "torch_npu", f"{version} does not load within {DEVICE_LIMIT_S} s; look at npu-smi."
        )
    if isinstance(devices, str):
        return Finding(
            Level.WRONG,
            "torch_npu",
            f"{version} cannot be loaded ({devices}); source CANN's set_env.sh, and see that it is the "
            "CANN that this torch_npu asks for.",
        )
    level = Level.OK if int(devices[1]) else Level.WRONG
    return Finding(level, "torch_npu", f"{version}, {devices[1]} devices")


def _cann(environ: Mapping[str, str]) -> Finding:
    home = next((environ[name] for name in _CANN_HOMES if environ.get(name)), _CANN_DEFAULT)
    for path in sorted(Path(home).glob("*/ascend_*_install.info")):
        match = re.search(r"^version=(\S+)", path.read_text(), re.M)
        if match:
            return Finding(Level.OK, "CANN", f"{match[1]} at {home}")
    return Finding(Level.NOTE, "CANN", f"{home} does not say which version it is; source CANN's set_env.sh")


# --- patches -------------------------------------------------------------------------------------


def check_patches(settings: Settings) -> list[Finding]:
    """Whether the installed SGLang is known or certified: a verdict for every feature and every patch.

    Fingerprints are taken from the files, so SGLang is not imported. The server looks at the functions of its
    own process, and so also sees what another plugin has replaced there.
    """
    try:
        known = known_build()
    except ContractError as error:
        return [Finding(Level.WRONG, "contract", str(error))]
    return verdicts(certificates.certified(known, settings))


def known_build() -> Known:
    """What is known of the installed SGLang by its functions alone. Raises ContractError if there is none."""
    seams = seams_for("npu" if version_of("torch_npu") else None)
    build = read_build(installed.release(), seams, installed.fingerprint)
    return Known(build, seams, load_contracts())


def sglang_site() -> Path:
    """The folder that holds `sglang/`. Raises ContractError if SGLang is not installed."""
    return installed.folder().parent


def verdicts(known: Known) -> list[Finding]:
    """A finding for the build, one for a certificate, one for each feature, one for each patch."""
    return [
        _build(known),
        *_certificate(known),
        *(_feature(known, feature) for feature in known.features),
        *(_patch(known, seam, patch) for seam in known.seams for patch in seam.patches),
    ]


def _build(known: Known) -> Finding:
    if CORE not in known.missing:
        return Finding(Level.OK, "contract", known.sentence.replace("in force", "would be in force", 1))
    text = f"{known.refusal} SGLang stays as it is; with SGLANG_NPU_PP=require the server does not start."
    return Finding(Level.WRONG, "contract", text)


def _certificate(known: Known) -> list[Finding]:
    """What it covers, or why it is refused; nothing where there is none."""
    if known.refused:
        level = Level.WRONG if CORE in known.missing else Level.WARNING
        return [Finding(level, "certificate", known.refused)]
    if known.certificate is None:
        return []
    found = f"of SGLang {known.certificate.label}, for {', '.join(known.certificate.features)}"
    covered = ", ".join(known.by_certificate) or "nothing that is unknown"
    level = Level.WARNING if known.certificate.trial else Level.OK
    trial = ", on trial: only for servers of certify" if known.certificate.trial else ""
    return [Finding(level, "certificate", f"{found}: covers {covered}{trial}")]


def _feature(known: Known, feature: str) -> Finding:
    if feature in known.missing:
        level = Level.WRONG if feature == CORE else Level.WARNING
        text = "not in force: a server that uses it stays upstream's, or does not start with require"
        return Finding(level, feature, f"{text} ({known.missing[feature]})")
    of_feature = [seam.name for seam in known.seams if seam.feature == feature]
    certified = [name for name in of_feature if name in known.by_certificate]
    if certified == of_feature:
        return Finding(Level.OK, feature, "by certificate")
    by_certificate = f"; by certificate: {', '.join(certified)}" if certified else ""
    return Finding(Level.OK, feature, f"as in {', '.join(known.releases_of(feature))}{by_certificate}")


def _patch(known: Known, seam: Seam, patch: Patch) -> Finding:
    name = patch.target.partition(":")[2]
    if seam.name in known.by_certificate:
        needed = patch.is_needed(known.contract_of(seam))
        text = "by certificate" if needed else f"SGLang {known.build.label} does not need this patch"
        return Finding(Level.OK if needed else Level.NOTE, name, text)
    releases = known.by_contract[seam.name]
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
