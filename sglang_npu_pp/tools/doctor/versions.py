"""Installed versions (SGLang, this plugin, torch, torch_npu, CANN); would SGLang load the plugin?"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import sglang_npu_pp

from ...errors import ContractError
from ...patches import PATCHES, installed, load_contracts
from ...patching import Contract, Contracts, Misfit, Patch, Why, known_contract, misfit
from .findings import Finding, Level

DEVICE_LIMIT_S = 120  # torch_npu may take a minute to load on a machine that has just started
_COUNT_DEVICES = "import torch, torch_npu; print('devices', torch.npu.device_count())"
_CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_CANN_DEFAULT = "/usr/local/Ascend/ascend-toolkit/latest"

Read = Callable[[str], str | None]
"""Fingerprint of a target in the installed SGLang, None if it does not have it."""


def check(environ: Mapping[str, str]) -> list[Finding]:
    findings = [
        Finding(Level.OK, "Python", f"{platform.python_version()} at {sys.executable}"),
        _sglang(),
        Finding(Level.OK, "sglang-npu-pp", sglang_npu_pp.__version__),
        *_plugins(environ),
        _package("torch", Level.WRONG, "install the one that your SGLang asks for"),
    ]
    if version_of("torch_npu") is None:
        text = "not installed: this machine serves on CPU or GPU"
        return [*findings, Finding(Level.NOTE, "torch_npu", text)]
    return [*findings, _torch_npu(), _cann(environ)]


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
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _COUNT_DEVICES],
            env=environment,
            capture_output=True,
            text=True,
            timeout=DEVICE_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Finding(
            Level.WRONG, "torch_npu", f"{version} does not load within {DEVICE_LIMIT_S} s; look at npu-smi."
        )
    devices = re.search(r"devices (\d+)", done.stdout)
    if done.returncode or devices is None:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Finding(
            Level.WRONG,
            "torch_npu",
            f"{version} cannot be loaded ({lines[-1]}); source CANN's set_env.sh, and see that it is the "
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


def check_patches() -> list[Finding]:
    """Whether the installed SGLang is one that the patches know: a verdict for each of them.

    Fingerprints are taken from the files, so SGLang is not imported. The server compares the functions of its
    own process, and so also sees what another plugin has replaced there.
    """
    try:
        release = installed.release()
    except ContractError as error:
        return [Finding(Level.WRONG, "contract", str(error))]
    device = "npu" if version_of("torch_npu") else None
    here = [patch for patch in PATCHES if patch.device in (None, device)]
    return verdicts(here, release, load_contracts(), installed.fingerprint)


def verdicts(patches: Sequence[Patch], release: str, contracts: Contracts, read: Read) -> list[Finding]:
    """A finding for each of `patches`, behind one for all of them."""
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
