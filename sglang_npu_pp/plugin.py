"""Activation, by plugin or by hand: settings, then contracts, then patches.

SGLang calls `register` in engine and scheduler processes and only logs its exceptions; with
`SGLANG_NPU_PP=require` the process therefore ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys

from .builds import CORE, Known, build_of_this_process
from .errors import ContractError, PipelineError, SettingsError
from .patching import AppliedPatches
from .settings import Settings, load_settings

logger = logging.getLogger("sglang_npu_pp")

_applied: AppliedPatches | None = None
_decision: str | None = None


def register() -> None:
    """Entry point of the group `sglang.srt.plugins`."""
    try:
        activate()
    except PipelineError as error:
        # SystemExit passes through SGLang's `except Exception`: the server must not start half way.
        raise SystemExit(f"sglang-npu-pp: {error}") from None


def activate(settings: Settings | None = None) -> bool:
    """Patch the SGLang of this process; True if it is patched now. Idempotent.

    Raises SettingsError, and with `SGLANG_NPU_PP=require` ContractError; otherwise an unknown SGLang is
    logged and left untouched.
    """
    global _applied, _decision
    if _decision is not None:
        return _applied is not None
    settings = settings or load_settings()
    if settings.mode == "0":
        _decide("off, because SGLANG_NPU_PP=0")
        return False
    try:
        # Not before: a process in which it is off does not pay for torch.
        from . import certificates, patches

        seams = patches.seams_here()
        build = build_of_this_process(patches.sglang_release(), seams)
        known = certificates.certified(Known(build, seams, patches.load_contracts()), settings)
        if CORE in known.missing:
            raise known.refusal
        _applied = AppliedPatches(known.patches)
    except (ContractError, ImportError) as error:
        if settings.mode == "require":
            raise ContractError(
                f"{error} SGLANG_NPU_PP=require, so this server does not start; install a release "
                "that is known, certify this one (python -m sglang_npu_pp certify), or set "
                "SGLANG_NPU_PP=auto."
            ) from error
        _decide(f"not activated, SGLang is left as it is: {error}", problem=True)
        return False
    patches.features.set_known(known)
    patches.startup.set_decision(known.sentence)
    _decide(known.sentence)
    return True


def deactivate() -> None:
    """Undo all patches of this process, for tests."""
    global _applied, _decision
    if _applied is not None:
        _applied.undo()
    _applied = _decision = None


def decision() -> str | None:
    """The decision of `activate`, as a sentence; None before."""
    return _decision


def _decide(sentence: str, problem: bool = False) -> None:
    """One log line a process; a patched scheduler logs it later, with its stage and rank."""
    global _decision
    _decision = sentence
    line = f"sglang-npu-pp: {sentence}"
    if _applied is not None and multiprocessing.parent_process() is not None:
        return
    if logger.isEnabledFor(logging.WARNING if problem else logging.INFO):
        logger.log(logging.WARNING if problem else logging.INFO, "%s", line)
    else:
        print(line, file=sys.stderr, flush=True)


__all__ = ["SettingsError", "activate", "deactivate", "decision", "register"]
