"""Files of certificates: one a build, in a folder of the user.

Read only where a build is not known. One counts if no other user can have written it, if it was not edited,
and if build, device and version of this package are those that were shown equal. Another one leaves the build
as unknown as it is, and the reason goes where the unknown functions are named.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec

from .builds import Build, Certificate, Known, Seam, differing
from .errors import CertificateError
from .observe.whole_file import write_whole
from .settings import PREFIX, Settings
from .version import __version__

VARIABLE = f"{PREFIX}_CERTIFICATES"
_SUFFIX = ".json"
_MOST_BYTES = 1 << 20  # a certificate of all functions has 20 kB
_OF_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class _File(msgspec.Struct, frozen=True):
    """Content of a file."""

    checksum: str
    place: str  # folder of a trial certificate, which counts there only
    certificate: Certificate


def folder(settings: Settings) -> Path:
    """Where certificates are. Raises CertificateError where no place is set and the user has no home."""
    if settings.certificates is not None:
        return settings.certificates
    configured = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    if not configured.is_absolute():  # as the XDG specification has it
        configured = Path(os.path.expanduser("~")) / ".config"
    if not configured.is_absolute():
        raise CertificateError(
            "This user has no home directory, so there is no folder of certificates; set "
            f"{VARIABLE} to one if this SGLang was certified."
        )
    return configured / "sglang-npu-pp" / "certificates"


def certified(known: Known, settings: Settings) -> Known:
    """The same with the certificate that counts, or with the reason why one does not."""
    if not known.missing:
        return known
    try:
        return replace(known, certificate=find(known, folder(settings)))
    except CertificateError as error:
        return replace(known, refused=str(error))


def identity(certificate: Certificate | None) -> str:
    """Equal on ranks with equal certificates."""
    return "none" if certificate is None else f"{certificate.digest} {_checksum(certificate, '')[:16]}"


def withdraw(known: Known, folder: Path) -> bool:
    """Remove the certificate of a build that was shown different since; whether there was one."""
    own = folder / f"{known.build.digest}{_SUFFIX}"
    try:
        own.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CertificateError(
            f"{own} is of a build that differs, and cannot be removed ({error.strerror}); remove it by hand."
        ) from None
    return True


# --- making one ----------------------------------------------------------------------------------


def for_known(known: Known, features: Iterable[str], trial: bool = False) -> Certificate:
    """Of `features`, those of the server that was shown equal; covers their seams that no release has.

    It keeps what a certificate of the same build covers already. `release_of` is empty where all of it is
    known. Raises CertificateError where the patches do not fit, whatever is shown.
    """
    before = known.certificate
    kept = before.features if before is not None and not (before.trial or trial) else ()
    covered = {*features, *kept}
    seams = [seam for seam in known.seams if seam.feature in covered and not known.by_contract[seam.name]]
    for seam in seams:
        _must_fit(seam, known.build)
    targets = sorted({target for seam in seams for target in seam.targets})
    return Certificate(
        label=known.build.label,
        digest=known.build.digest,
        features=tuple(feature for feature in known.features if feature in covered),
        functions={target: known.build.functions[target] for target in targets},
        release_of={seam.name: known.nearest for seam in seams},
        plugin=__version__,
        device=known.device,
        trial=trial,
    )


def _must_fit(seam: Seam, build: Build) -> None:
    """All functions can be read, what is replaced exists, and what is added does not."""
    for target in seam.targets:
        if target in build.unreadable:
            raise CertificateError(f"SGLang {build.label} cannot be certified: {build.unreadable[target]}")
    for patch in seam.patches:
        exists = build.functions[patch.target] is not None
        if patch.is_needed(build.functions) and exists is patch.adds:
            raise CertificateError(
                f"SGLang {build.label} cannot be certified: {patch.target} "
                f"{'exists' if exists else 'does not exist'}, so its patch does not fit; report it."
            )


def write(certificate: Certificate, folder: Path) -> Path:
    """Path of the file, readable for the user only, in the place of an older one of the build.

    Raises CertificateError where it cannot be written, or would not count.
    """
    path = folder / f"{certificate.digest}{_SUFFIX}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _must_be_ours(folder, folder.stat())
        place = os.path.realpath(folder) if certificate.trial else ""
        write_whole(path, _content(certificate, place), mode=0o600)
    except OSError as error:
        raise CertificateError(
            f"The certificate of SGLang {certificate.label} cannot be written to {folder} "
            f"({error.strerror}); set {VARIABLE} to a folder of this user."
        ) from None
    return path


def _content(certificate: Certificate, place: str) -> bytes:
    written = _File(_checksum(certificate, place), place, certificate)
    return msgspec.json.format(msgspec.json.encode(written), indent=1) + b"\n"


def _checksum(certificate: Certificate, place: str) -> str:
    return hashlib.sha256(msgspec.json.encode((place, certificate))).hexdigest()


# --- finding one ---------------------------------------------------------------------------------


def find(known: Known, folder: Path) -> Certificate | None:
    """That of the build; None where the folder has none.

    Raises CertificateError for one that does not count, and where there are only those of other builds: then
    with the functions in which the nearest of them differs.
    """
    own = folder / f"{known.build.digest}{_SUFFIX}"
    paths = _paths(folder)
    if own in paths:
        path, found = own, _read(own)
    else:
        others = list(_readable(paths))
        if not others:
            return None
        path, found = min(others, key=lambda each: len(_different(known.build, each[1].certificate)))
    _must_count(known, path, found)
    return found.certificate


def _paths(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == _SUFFIX)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CertificateError(
            f"The folder of certificates {folder} cannot be read ({error.strerror}); make it readable for "
            f"the user of the server, or set {VARIABLE}."
        ) from None


def _readable(paths: Sequence[Path]) -> Iterator[tuple[Path, _File]]:
    """What is wrong with a certificate of another build is of no interest here."""
    for path in paths:
        try:
            yield path, _read(path)
        except CertificateError:
            continue


def _read(path: Path) -> _File:
    """A file that only the user can have written, as it was written."""
    try:
        real = Path(os.path.realpath(path, strict=True))
        for place in {path.parent, real.parent}:  # two where the file is a link
            _must_be_ours(place, place.stat())
        # Not blocking, should it be a pipe; and what is looked at is what is read.
        with open(real, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            _must_be_ours(path, os.fstat(file.fileno()))
            content = file.read(_MOST_BYTES)
        found = msgspec.json.decode(content, type=_File)
    except (OSError, TypeError, msgspec.MsgspecError) as error:  # TypeError: nothing in a pipe
        raise CertificateError(
            f"{path} cannot be read as a certificate ({error}); run certify again."
        ) from None
    if _content(found.certificate, found.place) != content:
        raise CertificateError(f"{path} was edited, so it does not count; run certify again.")
    return found


def _must_be_ours(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise CertificateError(
            f"{path} belongs to another user (uid {status.st_uid}), so it does not count; run certify as the "
            "user of the server."
        )
    if status.st_mode & _OF_OTHERS:
        raise CertificateError(
            f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):o}), so it does not "
            "count; take that away (chmod go-w) and run certify again."
        )


def _must_count(known: Known, path: Path, found: _File) -> None:
    """For this build, this device, this version of the package, in this place."""
    certificate, build = found.certificate, known.build
    if certificate.plugin != __version__:
        raise CertificateError(
            f"{path} was written by sglang-npu-pp {certificate.plugin}, and this is {__version__} with other "
            "patches; run certify again."
        )
    if certificate.device != known.device:
        raise CertificateError(
            f"{path} is of a server on {_device(certificate.device)}, and this one is on "
            f"{_device(known.device)}; run certify again."
        )
    different = _different(build, certificate)
    if different or certificate.digest != build.digest:
        words = differing(different) if different else "functions that it does not list differ"
        copied = "" if path.stem == certificate.digest else " was copied, and"
        raise CertificateError(
            f"{path}{copied} is of another build, SGLang {certificate.label} ({words}); run certify again."
        )
    if path.stem != certificate.digest:
        raise CertificateError(
            f"{path} does not have the name of its build, {certificate.digest}{_SUFFIX}, so it does not "
            "count; rename it, or run certify again."
        )
    if certificate.trial and found.place != os.path.realpath(path.parent):
        raise CertificateError(
            f"{path} is a certificate on trial, for the servers of one run of certify only; run certify "
            "again."
        )


def _different(build: Build, certificate: Certificate) -> list[str]:
    """Functions that are not as certified."""
    return [
        target
        for target, certified in certificate.functions.items()
        if target not in build.functions or not build.has(target, certified)
    ]


def _device(name: str) -> str:
    return name.upper() or "CPU or GPU"
