"""Which SGLang this is: known by its functions, whatever it calls itself.

A seam is known where all functions that its patches replace or rely on are as in one release; another seam
may be as in another release, or certified. Seams belong to features. A feature is in force where all of its
seams are known, and otherwise not at all; without the core nothing is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .errors import ContractError
from .patching import Contract, Contracts, Patch, contract_targets, fingerprint, import_what_is_replaced

CORE = "core"
_NAMED = 4  # functions in a sentence


@dataclass(frozen=True)
class Seam:
    """The patches of one module of patches/."""

    name: str
    feature: str
    patches: tuple[Patch, ...]

    @property
    def targets(self) -> list[str]:
        """All functions that say whether it is known."""
        return sorted({*contract_targets(self.patches), *(patch.target for patch in self.patches)})


@dataclass(frozen=True)
class Build:
    """The functions of an SGLang, as they were found."""

    label: str
    """What it calls itself: for people only."""
    functions: Mapping[str, str | None]
    """Target -> fingerprint, None where there is no such function."""
    unreadable: Mapping[str, str] = field(default_factory=dict)
    """Target -> why it is not among `functions`, as a sentence."""

    def has(self, target: str, known: str | None) -> bool:
        """Whether the function has this fingerprint; with None, whether there is none."""
        return target not in self.unreadable and self.functions[target] == known

    @cached_property
    def digest(self) -> str:
        """Equal on two machines whose functions are equal."""
        found = sorted({**self.functions, **self.unreadable}.items())
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Certificate:
    """What certify has shown equal of one build, patched and unpatched. Files of it: certificates.py."""

    label: str
    """What the build calls itself: for people only."""
    digest: str
    """Of the build."""
    features: tuple[str, ...]
    functions: Mapping[str, str | None]
    """All functions of the seams that are covered."""
    release_of: Mapping[str, str]
    """Seam that is covered -> the release that the build is nearest to."""
    plugin: str
    """Version of this package, whose patches were in force."""
    device: str = ""
    trial: bool = False
    """For the servers of certify itself, which end before anything is shown."""

    def covers(self, seam: Seam, build: Build) -> bool:
        """Whether the seam was shown equal, with the functions that the build has now."""
        return (
            seam.feature in self.features
            and seam.name in self.release_of
            and all(
                target in self.functions and build.has(target, self.functions[target])
                for target in seam.targets
            )
        )


Read = Callable[[str], str | None]
"""Fingerprint of a target, None where there is no such function. Raises ContractError if it is unreadable."""


def read_build(label: str, seams: Iterable[Seam], read: Read) -> Build:
    functions: dict[str, str | None] = {}
    unreadable: dict[str, str] = {}
    for target in sorted({target for seam in seams for target in seam.targets}):
        try:
            functions[target] = read(target)
        except ContractError as error:
            unreadable[target] = str(error)
    return Build(label, functions, unreadable)


def build_of_this_process(label: str, seams: Sequence[Seam]) -> Build:
    import_what_is_replaced(patch for seam in seams for patch in seam.patches)
    return read_build(label, seams, fingerprint)


# --- what is known of it -------------------------------------------------------------------------


def unknown_targets(patch: Patch, contract: Contract, build: Build) -> tuple[str, ...]:
    """The one rule of what fits: functions that keep a patch from a build of that contract.

    Empty where the patch fits, or is not needed.
    """
    different = [
        target
        for target in patch.checked_targets(contract)
        if target not in contract or not build.has(target, contract[target])
    ]
    if not different and patch.is_needed(contract):
        has_target = not build.has(patch.target, None)
        return (patch.target,) if has_target is patch.adds else ()
    return tuple(different)


@dataclass(frozen=True)
class Known:
    """What is known of a build. `seams` are those of the device that it serves on."""

    build: Build
    seams: tuple[Seam, ...]
    contracts: Contracts
    certificate: Certificate | None = None
    refused: str = ""
    """Why a certificate that was found does not count, as a sentence."""

    @cached_property
    def by_contract(self) -> Mapping[str, tuple[str, ...]]:
        """Seam -> releases as in which all of its functions are, oldest first."""
        return {
            seam.name: tuple(release for release in self.contracts if not self._unknown(seam, release))
            for seam in self.seams
        }

    @cached_property
    def by_certificate(self) -> Mapping[str, str]:
        """Seam that is as in no release, but certified -> its nearest release."""
        certificate = self.certificate
        if certificate is None:
            return {}
        return {
            seam.name: certificate.release_of[seam.name]
            for seam in self.seams
            if not self.by_contract[seam.name] and certificate.covers(seam, self.build)
        }

    @cached_property
    def releases(self) -> Mapping[str, tuple[str, ...]]:
        """Seam -> releases as in which it is patched, oldest first; none where it is not known."""
        return {**self.by_contract, **{name: (release,) for name, release in self.by_certificate.items()}}

    @property
    def device(self) -> str:
        """That of the patches which are for one device only; empty where there are none."""
        return next((patch.device for seam in self.seams for patch in seam.patches if patch.device), "")

    @cached_property
    def features(self) -> tuple[str, ...]:
        """All there are, in their order; the core is the first."""
        return tuple(dict.fromkeys(seam.feature for seam in self.seams))

    @cached_property
    def missing(self) -> Mapping[str, str]:
        """Feature that is not in force -> which functions keep it off, in words."""
        found: dict[str, set[str]] = {}
        for seam in self.seams:
            if not self.releases[seam.name]:
                found.setdefault(seam.feature, set()).update(self._unknown(seam, self.nearest))
        return {feature: self.in_words(sorted(targets)) for feature, targets in found.items()}

    @property
    def in_force(self) -> tuple[str, ...]:
        if CORE in self.missing:
            return ()
        return tuple(feature for feature in self.features if feature not in self.missing)

    @cached_property
    def patches(self) -> tuple[Patch, ...]:
        """Those that this build needs, of the features that are in force."""
        return tuple(
            patch
            for seam in self.seams
            if seam.feature in self.in_force
            for patch in seam.patches
            if patch.is_needed(self.contract_of(seam))
        )

    @cached_property
    def nearest(self) -> str:
        """The release to compare with: what it calls itself, or else that from which the fewest differ."""
        if self.build.label in self.contracts:
            return self.build.label

        def distance(release: str) -> int:
            return len({target for seam in self.seams for target in self._unknown(seam, release)})

        return min(reversed(list(self.contracts)), key=distance)

    def releases_of(self, feature: str) -> tuple[str, ...]:
        """As in which its functions are: those that all of its seams share, or else one of each seam.

        Certified seams are as in none.
        """
        seams = [seam.name for seam in self.seams if seam.feature == feature]
        each = [self.by_contract[name] for name in seams if name not in self.by_certificate]
        shared = tuple(release for release in self.contracts if each and all(release in one for one in each))
        single = {releases[-1] for releases in each if releases}
        return shared or tuple(release for release in self.contracts if release in single)

    def contract_of(self, seam: Seam) -> Contract:
        """Of a release as in which the seam is; all such releases agree on what it needs.

        What a certified seam needs, its own functions say.
        """
        if seam.name in self.by_certificate:
            return self.build.functions
        return self.contracts[self.by_contract[seam.name][-1]]

    @property
    def sentence(self) -> str:
        """What is in force, for the log."""
        features = f"not for {self.why_not(self.missing)}" if self.missing else "all features"
        return f"{len(self.patches)} patches in force for SGLang {self.build.label}{self.content}, {features}"

    def why_not(self, features: Iterable[str]) -> str:
        """These, each with what keeps it off, and why a certificate does not help."""
        reasons = [f"{feature} ({self.missing[feature]})" for feature in features]
        return "; ".join([*reasons, *([self.refused.rstrip(".")] if self.refused else [])])

    @property
    def content(self) -> str:
        """As in which releases its functions are, where its name does not say so; what is certified."""
        parts = [part for part in (self._releases_in_words, self._certified_in_words) if part]
        return f" ({'; '.join(parts)})" if parts else ""

    @property
    def _certified_in_words(self) -> str:
        if self.certificate is None or not self.by_certificate:
            return ""
        how = "on trial" if self.certificate.trial else "by certificate"
        return f"{how}: {', '.join(self.by_certificate)}"

    @property
    def _releases_in_words(self) -> str:
        known = {name: releases for name, releases in self.by_contract.items() if releases}
        if not known:
            return ""
        most = max(
            self.contracts,
            key=lambda one: (sum(one in each for each in known.values()), one == self.build.label),
        )
        others = [f"{name} of {releases[-1]}" for name, releases in known.items() if most not in releases]
        if not others and most == self.build.label:
            return ""
        return f"functions of {', '.join([most, *others])}"

    @property
    def refusal(self) -> ContractError:
        """Why nothing is in force."""
        cause = " (another plugin, or an edited file?)" if self.nearest == self.build.label else ""
        refused = f" {self.refused}" if self.refused else ""
        return ContractError(
            f"SGLang {self.build.label} is not a build that sglang-npu-pp knows: {self.missing[CORE]}{cause}."
            f"{refused}"
        )

    def _unknown(self, seam: Seam, release: str) -> list[str]:
        contract = self.contracts[release]
        return [target for patch in seam.patches for target in unknown_targets(patch, contract, self.build)]

    def in_words(self, targets: Sequence[str]) -> str:
        """Which functions differ, and from what; first what cannot be read, since there lies the cause."""
        reasons = [
            self.build.unreadable[target].rstrip(".") for target in targets if target in self.build.unreadable
        ]
        different = [target for target in targets if target not in self.build.unreadable]
        if different:
            reasons.append(f"{differing(different)} from SGLang {self.nearest}")
        return "; ".join(reasons)


def differing(targets: Sequence[str]) -> str:
    """That these functions differ, the first of them named."""
    more = len(targets) - _NAMED
    named = [*targets[:_NAMED], *([f"{more} more"] if more > 0 else [])]
    return f"{', '.join(named)} {'differs' if len(targets) == 1 else 'differ'}"
