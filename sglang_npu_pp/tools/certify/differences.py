"""How the functions that are not known differ from those of a known release, as diffs for a reader."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from pathlib import Path

from ...builds import Known, unknown_targets
from ...errors import PipelineError
from ...fingerprints import fingerprint_of_source, source_in_file
from .releases import LIMIT_S, FolderTexts, NoTextError, Releases, Texts
from .results import Difference

_CONTEXT = 4  # lines around a change


def differences(
    known: Known,
    here: Path,
    reference: Path | None = None,
    *,
    cache: Path | None = None,
    limit_s: float = LIMIT_S,
) -> list[Difference]:
    """One for each function of a seam that is as in no release; none where only the spelling differs.

    `here`: the folder that holds the installed `sglang/`. `reference`: a folder or a wheel to compare with;
    without it the nearest release is downloaded into `cache`, within `limit_s`. Raises NoTextError for a
    reference that is none.
    """
    releases = Releases(reference, cache, limit_s)
    installed = FolderTexts(here, known.build.label)
    found = []
    for target, release in sorted(unknown(known).items()):
        difference = _difference(known, target, release, installed, releases)
        if difference is not None:
            found.append(difference)
    return found


def unknown(known: Known) -> Mapping[str, str]:
    """Target -> the release to compare with, for every function that keeps its seam from being known."""
    known = Known(known.build, known.seams, known.contracts)  # whatever a certificate says
    contract = known.contracts[known.nearest]
    targets = {
        target
        for seam in known.seams
        if not known.releases[seam.name]
        for patch in seam.patches
        for target in unknown_targets(patch, contract, known.build)
    }
    return {target: _nearest(known, target) for target in targets}


def _nearest(known: Known, target: str) -> str:
    """The nearest release, unless it lacks the function and another has it, or another has just this one."""
    equal = _equal(known, target)
    if equal:
        return equal[-1]
    having = [release for release, contract in known.contracts.items() if contract.get(target) is not None]
    exists = target in known.build.unreadable or known.build.functions.get(target) is not None
    if known.nearest in having or not exists or not having:
        return known.nearest
    return having[-1]


def _equal(known: Known, target: str) -> list[str]:
    """Releases in which the function is the same program."""
    found = known.build.functions.get(target)
    if found is None:
        return []
    return [release for release, contract in known.contracts.items() if contract.get(target) == found]


def _difference(
    known: Known, target: str, release: str, installed: Texts, releases: Releases
) -> Difference | None:
    if target in known.build.unreadable:
        return Difference(target, release, known.build.unreadable[target])
    if equal := _equal(known, target):
        text = f"As in SGLang {', '.join(equal)}, but not as in {known.nearest}, where the others come from."
        return Difference(target, equal[-1], text)
    try:
        now = function(installed, target)
        texts = releases.of(release)
        then = function(texts, target)
    except NoTextError as error:
        return Difference(target, release, _without_text(target, release, installed, str(error)))
    if now is not None and then is not None and fingerprint_of_source(now) == fingerprint_of_source(then):
        return None
    return Difference(target, texts.release, diff(then, now, texts.release))


def function(texts: Texts, target: str) -> str | None:
    """Text of a function as if it stood alone, None if absent. Raises NoTextError for what is not Python."""
    module, _, qualname = target.partition(":")
    source = texts.module(module)
    try:
        found = None if source is None else source_in_file(source, qualname)
    except SyntaxError as error:
        raise NoTextError(f"{module} of SGLang {texts.release} cannot be parsed ({error}).") from None
    return None if found is None else textwrap.dedent(found)


def diff(then: str | None, now: str | None, release: str) -> str:
    """Unified, below a sentence where one side has no such function."""
    lines = difflib.unified_diff(
        (then or "").splitlines(),
        (now or "").splitlines(),
        f"SGLang {release}",
        "this build",
        n=_CONTEXT,
        lineterm="",
    )
    shown = "\n".join(line.rstrip() for line in lines)
    if then is None and now is None:
        return f"Neither SGLang {release} nor this build has it."
    if then is None:
        return f"SGLang {release} has no such function.\n{shown}"
    if now is None:
        return f"This build has no such function.\n{shown}"
    return shown


def _without_text(target: str, release: str, installed: Texts, why: str) -> str:
    sentence = f"{why} Name SGLang {release}, a wheel or a folder, with --reference for a diff."
    try:
        now = function(installed, target)
    except PipelineError as error:
        return f"{sentence} {error}"
    if now is None:
        return f"{sentence} This build has no such function."
    return f"{sentence} The function as it is here:\n{now}"
