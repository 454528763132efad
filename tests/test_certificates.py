"""A build with a certificate is in force as a known one is; a certificate that does not count is refused."""

from __future__ import annotations

import os
import pickle
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from rig.harness import Here, Team
from sglang_npu_pp import certificates
from sglang_npu_pp.builds import (
    CORE,
    Build,
    Certificate,
    Known,
    Seam,
    build_of_this_process,
    read_build,
)
from sglang_npu_pp.certificates import certified, for_known, write
from sglang_npu_pp.errors import AgreementError, CertificateError
from sglang_npu_pp.patches import features, installed, seams_here, sglang_release, startup
from sglang_npu_pp.patches.features import DISAGGREGATION, LORA
from sglang_npu_pp.settings import Settings
from tests.test_builds import FOUR, FUNCTIONS, LOOP, TIMES, of_release
from tests.test_copies import LOOP as LOOP_MODULE
from tests.test_copies import known_copy, replaced

LABEL = "0.5.24.dev7+gabc"
RELEASE = "0.5.21"
CHANGED, OTHERWISE = "0123456789abcdef", "fedcba9876543210"
LAUNCH = f"{LOOP_MODULE}:SchedulerPPMixin._pp_launch_batch"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to another user")


def unknown(**changes: str | None) -> Known:
    """A build whose loop is as in no release."""
    return of_release(RELEASE, LABEL, **{"_pp_launch_batch": CHANGED, **changes})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(certificates=tmp_path / "certificates")


@pytest.fixture
def folder(settings: Settings) -> Path:
    return certificates.folder(settings)


@pytest.fixture
def path(folder: Path) -> Path:
    """Of the certificate of `unknown()`, for the core."""
    return write(for_known(unknown(), [CORE]), folder)


# --- in force ------------------------------------------------------------------------------------


def test_a_build_with_a_certificate_is_in_force(settings: Settings, path: Path) -> None:
    assert unknown().in_force == ()
    found = certified(unknown(), settings)
    assert found.missing == {}
    assert found.in_force == of_release(RELEASE).in_force
    assert found.patches == of_release(RELEASE).patches
    seams = ", ".join(seam.name for seam in found.seams if LAUNCH in seam.targets)
    assert found.sentence == (
        f"{len(found.patches)} patches in force for SGLang {LABEL} (functions of {RELEASE}; by certificate: "
        f"{seams}), all features"
    )


def test_a_certificate_is_a_file_of_the_user_only(path: Path) -> None:
    assert path.name == f"{unknown().build.digest}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_it_covers_the_features_that_were_shown_equal_and_no_others(settings: Settings, folder: Path) -> None:
    both = unknown(send_kv_chunk=CHANGED)
    write(for_known(both, [CORE]), folder)
    found = certified(both, settings)
    assert list(found.missing) == [DISAGGREGATION]
    write(for_known(both, [CORE, DISAGGREGATION]), folder)
    assert certified(both, settings).missing == {}


def test_a_second_certificate_keeps_what_the_first_covers(settings: Settings, folder: Path) -> None:
    both = unknown(send_kv_chunk=CHANGED)
    write(for_known(both, [CORE]), folder)
    write(for_known(certified(both, settings), [DISAGGREGATION]), folder)
    assert certified(both, settings).missing == {}


def test_it_lists_the_unknown_seams_with_all_their_functions() -> None:
    certificate = for_known(unknown(send_kv_chunk=CHANGED), [CORE, LORA])
    covered = {seam.name for seam in unknown().seams if LAUNCH in seam.targets}
    assert dict(certificate.release_of) == dict.fromkeys(covered, RELEASE)
    assert set(certificate.functions) == {
        target for seam in unknown().seams if seam.name in covered for target in seam.targets
    }
    assert certificate.features == (CORE, LORA)


def test_a_known_build_needs_none(settings: Settings, folder: Path) -> None:
    """Nothing is read then: not even a folder that would be refused."""
    folder.mkdir()
    (folder / "bad.json").write_text("{")
    folder.chmod(0o777)
    known = of_release(RELEASE)
    assert certified(known, settings) is known
    assert for_known(known, [CORE]).release_of == {}


def test_without_a_certificate_nothing_is_said(settings: Settings, folder: Path) -> None:
    assert certified(unknown(), settings) == unknown()
    folder.mkdir(mode=0o770)
    assert certified(unknown(), settings) == unknown()


def test_a_copy_with_a_renamed_local_is_in_force_and_not_when_it_changes_again(tmp_path: Path) -> None:
    """As on a user's machine: real files."""
    settings = Settings(certificates=tmp_path / "certificates")
    renamed = replaced(LOOP_MODULE, "_pp_launch_batch(\n        self: Scheduler,\n        mb_id", NEW)
    found = known_copy(tmp_path / "once", renamed)
    assert found.in_force == ()
    write(for_known(found, [CORE]), certificates.folder(settings))
    assert certified(found, settings).missing == {}
    again = known_copy(tmp_path / "twice", replaced(LOOP_MODULE, "record_function(", "record_other("))
    sentence = refusal(certified(again, settings))
    assert f"is of another build, SGLang {LABEL} ({LOOP_MODULE}:SchedulerPPMixin._" in sentence
    assert LAUNCH in sentence
    assert sentence.endswith("; run certify again.")


NEW = "_pp_launch_batch(\n        self: Scheduler,\n        slot"


def test_the_functions_of_a_certified_seam_say_which_patches_it_needs() -> None:
    """Its nearest release has `old` and no `new`; the build has it the other way round."""
    functions = {**FUNCTIONS["1.0"], "m:added": None, "m:old": None, "m:new": "x"}
    known = Known(Build("1.1", functions), FOUR, FUNCTIONS)
    assert CORE in known.missing
    found = replace(known, certificate=for_known(known, [CORE]))
    assert [each.target for each in found.patches] == ["m:step", "m:added", "m:extra", "m:more"]


def test_a_certificate_covers_no_function_that_has_changed_since() -> None:
    """Also where no file is between, with its checks."""
    before = Known(Build("1.1", {**FUNCTIONS["1.0"], "m:added": None, "m:step": "x"}), FOUR, FUNCTIONS)
    certificate = for_known(before, [CORE])
    for function in LOOP.targets:
        changed = Build("1.1", {**before.build.functions, function: "y"})
        assert not certificate.covers(LOOP, changed)
    assert certificate.covers(LOOP, before.build)
    assert not certificate.covers(TIMES, before.build)


# --- refused -------------------------------------------------------------------------------------


def refusal(found: Known) -> str:
    """Why the certificate does not count; it is in every sentence that could want it."""
    assert found.certificate is None
    assert found.in_force == ()
    assert found.refused
    assert found.refused in str(found.refusal)
    return found.refused


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


EDITS: dict[str, Callable[[Path], object]] = {
    "another fingerprint": lambda path: edit(path, CHANGED, OTHERWISE),
    "another feature": lambda path: edit(path, f'"{CORE}"', f'"{CORE}", "{LORA}"'),
    "another checksum": lambda path: edit(path, '"checksum": "', '"checksum": "0'),
    "without its label": lambda path: edit(path, f'"label": "{LABEL}",', ""),
    "one more field": lambda path: edit(path, '"certificate":', '"note": "mine",\n "certificate":'),
    "formatted otherwise": lambda path: edit(path, "\n ", "\n  "),
    "half of it": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "empty": lambda path: path.write_bytes(b""),
    "of another kind": lambda path: path.write_text("[]"),
    "numbers for texts": lambda path: edit(path, f'"{CHANGED}"', "12"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"trusted": True})),
    "too long": lambda path: path.write_bytes(path.read_bytes() + b" " * (1 << 20)),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_one_that_was_edited_is_refused(
    settings: Settings, path: Path, change: Callable[[Path], object]
) -> None:
    change(path)
    sentence = refusal(certified(unknown(), settings))
    assert sentence.startswith(f"{path} ")
    assert "was edited" in sentence or "cannot be read as a certificate (" in sentence
    assert sentence.endswith("; run certify again.")


@pytest.mark.parametrize("mode", [0o602, 0o666, 0o620])
def test_one_that_others_may_write_is_refused(settings: Settings, path: Path, mode: int) -> None:
    path.chmod(mode)
    sentence = refusal(certified(unknown(), settings))
    assert f"{path} can be written by other users (mode {mode:o})" in sentence


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_may_write_is_refused(settings: Settings, path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    sentence = refusal(certified(unknown(), settings))
    assert f"{path.parent} can be written by other users (mode {mode:o})" in sentence
    with pytest.raises(CertificateError, match="can be written by other users"):
        write(for_known(unknown(), [CORE]), path.parent)


@as_root
@pytest.mark.parametrize("of_folder", [True, False])
def test_one_of_another_user_is_refused(settings: Settings, path: Path, of_folder: bool) -> None:
    place = path.parent if of_folder else path
    os.chown(place, 1234, -1)
    sentence = refusal(certified(unknown(), settings))
    assert f"{place} belongs to another user (uid 1234)" in sentence


@as_root
def test_one_of_root_counts_for_every_user(
    settings: Settings, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    assert certified(unknown(), settings).missing == {}


def test_a_link_counts_as_what_it_leads_to(settings: Settings, path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    path.symlink_to(path.rename(elsewhere / path.name))
    assert certified(unknown(), settings).missing == {}
    elsewhere.chmod(0o777)
    assert f"{elsewhere} can be written by other users" in refusal(certified(unknown(), settings))


def test_a_link_to_nothing_and_a_pipe_are_refused(settings: Settings, path: Path) -> None:
    path.unlink()
    path.symlink_to("missing")
    assert "cannot be read as a certificate" in refusal(certified(unknown(), settings))
    path.unlink()
    os.mkfifo(path, 0o600)
    assert "cannot be read as a certificate" in refusal(certified(unknown(), settings))


def test_a_folder_that_is_none_is_refused(settings: Settings, folder: Path) -> None:
    folder.write_text("a file")
    sentence = refusal(certified(unknown(), settings))
    assert f"The folder of certificates {folder} cannot be read (Not a directory)" in sentence
    with pytest.raises(CertificateError, match=r"cannot be written to .* \(File exists\)"):
        write(for_known(unknown(), [CORE]), folder)


def test_one_that_was_copied_from_another_build_is_refused(settings: Settings, path: Path) -> None:
    other = unknown(_pp_commit_comm_work=CHANGED)
    path.rename(path.with_stem(other.build.digest))
    sentence = refusal(certified(other, settings))
    assert f"{other.build.digest}.json was copied, and is of another build, SGLang {LABEL}" in sentence
    assert "._pp_commit_comm_work differs)" in sentence


def test_one_with_another_name_is_refused(settings: Settings, path: Path) -> None:
    path.rename(path.with_stem("mine"))
    sentence = refusal(certified(unknown(), settings))
    assert f"mine.json does not have the name of its build, {path.name}" in sentence


def test_the_nearest_of_other_builds_is_named(settings: Settings, folder: Path, path: Path) -> None:
    """SGLang was upgraded; one that cannot be read is of no interest."""
    write(for_known(of_release("0.5.18", "0.5.18.post9", _pp_launch_batch=CHANGED), [CORE]), folder)
    (folder / "damaged.json").write_text("{")
    sentence = refusal(certified(unknown(_pp_commit_comm_work=OTHERWISE), settings))
    assert sentence.startswith(f"{path} is of another build, SGLang {LABEL} (")
    assert "._pp_commit_comm_work differs); run certify again." in sentence


def test_a_change_in_a_seam_that_it_does_not_list_counts(settings: Settings, path: Path) -> None:
    """The whole was shown equal: with the other functions as they were."""
    sentence = refusal(certified(unknown(send_kv_chunk=CHANGED), settings))
    assert "is of another build" in sentence
    assert "(functions that it does not list differ)" in sentence


def test_long_lists_are_cut(settings: Settings, folder: Path) -> None:
    write(for_known(of_release("0.5.15", "0.5.15.post9", _pp_launch_batch=CHANGED), [CORE]), folder)
    assert " more differ); run certify again." in refusal(certified(unknown(), settings))


def test_one_of_another_version_of_this_package_is_refused(
    settings: Settings, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "__version__", "0.2.0")
    sentence = refusal(certified(unknown(), settings))
    assert f"{path} was written by sglang-npu-pp 0.1.0, and this is 0.2.0 with other patches" in sentence


def test_one_of_another_device_is_refused(settings: Settings, folder: Path) -> None:
    on_npu = of_release(RELEASE, LABEL, "npu", _pp_launch_batch=CHANGED)
    path = write(for_known(on_npu, [CORE]), folder)
    assert certified(on_npu, settings).missing == {}
    assert f"{path} is of a server on NPU, and this one is on CPU or GPU" in refusal(
        certified(unknown(), settings)
    )


def test_without_the_core_or_without_a_feature_the_reason_is_said_once(
    settings: Settings, folder: Path
) -> None:
    known = of_release(RELEASE, LABEL, send_kv_chunk=CHANGED, try_overlap_load_lora=CHANGED)
    path = write(for_known(known, [DISAGGREGATION, LORA]), folder)
    path.chmod(0o666)
    found = certified(known, settings)
    assert CORE in found.in_force
    assert set(found.missing) == {DISAGGREGATION, LORA}
    assert found.sentence.count("can be written by other users") == 1
    assert found.sentence.endswith("take that away (chmod go-w) and run certify again")


# --- on trial ------------------------------------------------------------------------------------


def test_a_trial_certificate_counts_in_its_folder_only(
    settings: Settings, folder: Path, tmp_path: Path
) -> None:
    path = write(for_known(unknown(), [CORE], trial=True), folder)
    found = certified(unknown(), settings)
    assert found.missing == {}
    assert "; on trial: " in found.sentence
    kept = tmp_path / "kept"
    folder.rename(kept)
    sentence = refusal(certified(unknown(), Settings(certificates=kept)))
    assert f"{kept / path.name} is a certificate on trial" in sentence


def test_a_trial_adds_nothing_to_what_is_certified(settings: Settings, folder: Path) -> None:
    both = unknown(send_kv_chunk=CHANGED)
    write(for_known(both, [CORE], trial=True), folder)
    assert for_known(certified(both, settings), [DISAGGREGATION]).features == (DISAGGREGATION,)


# --- what cannot be certified ------------------------------------------------------------------------


def test_a_function_that_cannot_be_read_cannot_be_certified() -> None:
    sentence = "m:step is wrapped by something that is not SGLang's (other.py, line 3; another plugin?)."
    build = Build("1.1", {**FUNCTIONS["1.0"], "m:added": None}, {"m:step": sentence})
    with pytest.raises(CertificateError) as caught:
        for_known(Known(build, FOUR, FUNCTIONS), [CORE])
    assert str(caught.value) == f"SGLang 1.1 cannot be certified: {sentence}"


@pytest.mark.parametrize(
    ("function", "found", "what"),
    [("m:step", None, "m:step does not exist"), ("m:added", "x", "m:added exists")],
)
def test_a_patch_that_does_not_fit_cannot_be_certified(function: str, found: str | None, what: str) -> None:
    build = Build("1.1", {**FUNCTIONS["1.0"], "m:added": None, function: found})
    with pytest.raises(CertificateError, match=f"^SGLang 1.1 cannot be certified: {what}, so its patch does"):
        for_known(Known(build, FOUR, FUNCTIONS), [CORE])
    assert for_known(Known(build, FOUR, FUNCTIONS), ["extras"]).release_of == {}


# --- where ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"HOME": "/home/me"}, "/home/me/.config"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "/etc/mine"}, "/etc/mine"),
        ({"HOME": "/home/me", "XDG_CONFIG_HOME": "relative"}, "/home/me/.config"),
    ],
)
def test_certificates_are_in_the_users_configuration(environment: dict[str, str], place: str) -> None:
    with mock.patch.dict(os.environ, environment):
        if "XDG_CONFIG_HOME" not in environment:
            os.environ.pop("XDG_CONFIG_HOME", None)
        assert certificates.folder(Settings()) == Path(place) / "sglang-npu-pp/certificates"


def test_a_user_without_a_home_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container with any user's id, say."""
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert "set SGLANG_NPU_PP_CERTIFICATES" in refusal(certified(unknown(), Settings()))


# --- ranks ---------------------------------------------------------------------------------------


def agreed(here: Here, round_name: str, features_of_ranks: list[list[str] | None]) -> str:
    """What the start of a rank with such a certificate ends with; "" where all agree."""
    mine = features_of_ranks[here.index]
    store = dist.PrefixStore(round_name, dist.distributed_c10d._get_default_store())
    features.set_known(replace(unknown(), certificate=for_known(unknown(), mine) if mine else None))
    try:
        with mock.patch.object(dist.distributed_c10d, "_get_default_store", return_value=store):
            startup._agree_with_all_ranks(Settings(start_limit_s=20), None)
    except AgreementError as error:
        return str(error)
    finally:
        features.set_known(None)
    return ""


@pytest.mark.slow
def test_ranks_with_equal_certificates_agree(team: Team) -> None:
    assert team.each(agreed, team.new_round(), [[CORE]] * 3) == [""] * 3


@pytest.mark.slow
def test_ranks_with_different_certificates_end_with_a_sentence(team: Team) -> None:
    """One of them covers LoRA too, which is known anyway: nothing else differs."""
    one, other = (certificates.identity(for_known(unknown(), covered)) for covered in ([CORE], [CORE, LORA]))
    sentences = team.each(agreed, team.new_round(), [[CORE], [CORE, LORA], [CORE]])
    for rank, sentence in enumerate(sentences):
        assert sentence.startswith(f"rank {rank}: the ranks do not run the same pipeline (certificate is ")
        assert f"certificate is {one!r} on rank 0, 2 but {other!r} on rank 1)" in sentence


@pytest.mark.slow
def test_a_rank_without_the_certificate_is_named(team: Team) -> None:
    for sentence in team.each(agreed, team.new_round(), [[CORE], [CORE], None]):
        assert "but 'none' on rank 2" in sentence
        assert "features is " in sentence


def test_the_identity_is_that_of_the_content() -> None:
    known = unknown()
    assert certificates.identity(for_known(known, [CORE])) == certificates.identity(for_known(known, [CORE]))
    assert certificates.identity(None) == "none"
    changes: list[dict[str, Any]] = [{"label": "x"}, {"features": ()}, {"trial": True}, {"functions": {}}]
    found = {certificates.identity(replace(for_known(known, [CORE]), **change)) for change in changes}
    assert len(found) == len(changes)


def test_a_certificate_covers_a_seam_if_it_names_both_it_and_its_feature() -> None:
    seam, build = Seam("loop", CORE, ()), Build("1.1", {})
    certificate = Certificate("1.1", "d", (CORE,), {}, {"loop": "1.0"}, "0.1.0")
    assert certificate.covers(seam, build)
    assert not replace(certificate, release_of={}).covers(seam, build)
    assert not replace(certificate, features=("extras",)).covers(seam, build)


def test_what_certify_reads_from_files_is_what_a_server_has() -> None:
    seams = seams_here()
    on_disk = read_build(installed.release(), seams, installed.fingerprint)
    assert on_disk.digest == build_of_this_process(sglang_release(), seams).digest
