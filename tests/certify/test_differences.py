"""Diffs of the functions that are not known, against small releases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from sglang_npu_pp.builds import CORE, Build, Known, Seam, read_build
from sglang_npu_pp.fingerprints import fingerprint_in_file, fingerprint_on_disk
from sglang_npu_pp.patching import Patch
from sglang_npu_pp.tools.certify import releases
from sglang_npu_pp.tools.certify.differences import differences, unknown
from sglang_npu_pp.tools.certify.releases import NoTextError
from sglang_npu_pp.tools.certify.results import Difference

from .wheels import write_folder, write_wheel

LOOP = '''
class Loop:
    def step(self, batch):
        """Run one."""
        self.launch(batch, self.stream)
        return batch

    def launch(self, batch, stream):
        return batch
'''
EXTRA = "def start(port):\n    return port\n"
TARGETS = ("sglang.loop:Loop.step", "sglang.loop:Loop.launch", "sglang.loop:Loop.new", "sglang.extra:start")


def patch(target: str, *relies_on: str) -> Patch:
    return Patch(target, len, why="w", how="h", upstream="u", plan="p", relies_on=relies_on)


SEAMS = (Seam("loop", CORE, (patch(*TARGETS[:3]),)), Seam("extra", "extras", (patch(TARGETS[3]),)))
RELEASES = {
    "1.0": {"loop": LOOP.replace("return batch", "return None"), "extra": EXTRA},
    "2.0": {"loop": LOOP, "extra": EXTRA.replace("port", "address")},
}


def contract(modules: dict[str, str]) -> dict[str, str | None]:
    found = {}
    for target in TARGETS:
        module, _, name = target.removeprefix("sglang.").partition(":")
        found[target] = fingerprint_in_file(modules[module], name)
    return found


CONTRACTS = {release: contract(modules) for release, modules in RELEASES.items()}


class Machine:
    """A folder with an installed build, and one with the wheels of the releases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wheels = {name: write_wheel(folder / "wheels", name, text) for name, text in RELEASES.items()}

    def install(self, loop: str = LOOP, extra: str = RELEASES["2.0"]["extra"]) -> Known:
        self.here = write_folder(self.folder / "here", "2.0.dev1", {"loop": loop, "extra": extra})
        package = self.here / "sglang"
        build = read_build("2.0.dev1", SEAMS, lambda target: fingerprint_on_disk(target, package))
        return Known(build, SEAMS, CONTRACTS)

    def differences(self, known: Known, release: str = "2.0") -> dict[str, Difference]:
        found = differences(known, self.here, self.wheels[release])
        return {each.target.partition(":")[2]: each for each in found}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def changes(diff: str) -> list[str]:
    return [line for line in diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]


def test_a_known_build_has_none(machine: Machine) -> None:
    assert machine.differences(machine.install()) == {}


def test_a_change_is_shown_and_nothing_else(machine: Machine) -> None:
    known = machine.install(LOOP.replace("launch(batch, self.stream)", "launch(self.stream, batch)"))
    found = machine.differences(known)
    assert set(found) == {"Loop.step"}
    assert found["Loop.step"].release == "2.0"
    assert changes(found["Loop.step"].diff) == [
        "-    self.launch(batch, self.stream)",
        "+    self.launch(self.stream, batch)",
    ]
    assert found["Loop.step"].diff.startswith("--- SGLang 2.0\n+++ this build\n@@")


def test_spelling_is_no_difference(machine: Machine) -> None:
    assert machine.differences(machine.install(LOOP.replace("Run one.", "Runs one batch."))) == {}


def test_of_a_changed_seam_only_the_functions_that_differ_are_shown(machine: Machine) -> None:
    spelled = LOOP.replace("Run one.", "Runs one batch.").replace(
        "        return batch\n\n", "        return None\n\n"
    )
    assert set(machine.differences(machine.install(spelled))) == {"Loop.step"}


def test_a_function_that_is_gone_is_said_so(machine: Machine) -> None:
    known = machine.install(LOOP.replace("def launch(", "def start_launch("))
    found = machine.differences(known)["Loop.launch"]
    assert found.diff.startswith("This build has no such function.\n")
    assert changes(found.diff) == ["-def launch(self, batch, stream):", "-    return batch"]


def test_a_function_that_is_new_is_said_so(machine: Machine) -> None:
    known = machine.install(f"{LOOP}\n    def new(self):\n        return 1\n")
    found = machine.differences(known)["Loop.new"]
    assert found.diff.startswith("SGLang 2.0 has no such function.\n")
    assert changes(found.diff) == ["+def new(self):", "+    return 1"]


def test_a_function_of_another_release_is_named_after_it(machine: Machine) -> None:
    """Each is known, but no release has them together."""
    known = machine.install(LOOP.replace("return batch\n\n", "return None\n\n"))
    found = machine.differences(known)
    assert set(found) == {"Loop.step"}
    assert found["Loop.step"].release == "1.0"
    assert found["Loop.step"].diff.startswith("As in SGLang 1.0, but not as in 2.0")


def test_a_function_that_the_nearest_release_lacks_is_compared_with_one_that_has_it(machine: Machine) -> None:
    with_new = {**CONTRACTS["1.0"], "sglang.loop:Loop.new": "0123456789abcdef"}
    known = machine.install(f"{LOOP}\n    def new(self):\n        return 1\n")
    found = unknown(Known(known.build, SEAMS, {**CONTRACTS, "1.0": with_new}))
    assert found == {"sglang.loop:Loop.new": "1.0"}


def test_only_seams_that_are_not_known_are_looked_at(machine: Machine) -> None:
    found = unknown(machine.install(extra=EXTRA.replace("return port", "return int(port)")))
    assert list(found) == ["sglang.extra:start"]


def test_what_cannot_be_read_is_the_reason(machine: Machine) -> None:
    known = machine.install()
    target = TARGETS[0]
    wrapped = Build("2.0.dev1", known.build.functions, {target: f"{target} is wrapped by another plugin."})
    (found,) = differences(Known(wrapped, SEAMS, CONTRACTS), machine.here, machine.wheels["2.0"])
    assert found.diff == f"{target} is wrapped by another plugin."


def test_a_reference_of_another_release_is_named_as_what_it_is(machine: Machine) -> None:
    known = machine.install(LOOP.replace("launch(batch, self.stream)", "launch(self.stream, batch)"))
    assert machine.differences(known, "1.0")["Loop.step"].release == "1.0"


def test_the_nearest_release_is_downloaded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(machine.folder / "wheels"))
    known = machine.install(LOOP.replace("launch(batch, self.stream)", "launch(self.stream, batch)"))
    (found,) = differences(known, machine.here, cache=machine.folder / "cache")
    assert "+    self.launch(self.stream, batch)" in found.diff
    assert [path.name for path in (machine.folder / "cache").iterdir()] == [machine.wheels["2.0"].name]


@pytest.mark.parametrize(
    ("loop", "shown"),
    [
        (LOOP.replace("self.stream)", "None)"), ["def step(self, batch):", "self.launch(batch, None)"]),
        (LOOP.replace("def step(", "def stop("), ["This build has no such function."]),
    ],
)
def test_without_any_text_the_function_is_shown_as_it_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, loop: str, shown: Sequence[str]
) -> None:
    def fails(release: str, cache: Path, limit_s: float) -> Path:
        raise NoTextError("pip cannot download it (no network).")

    monkeypatch.setattr(releases, "fetch", fails)
    (found,) = differences(machine.install(loop), machine.here)
    sentence = "Name SGLang 2.0, a wheel or a folder, with --reference for a diff."
    assert found.diff.startswith(f"pip cannot download it (no network). {sentence}")
    assert all(part in found.diff for part in shown)


def test_a_reference_that_is_none_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(NoTextError, match="--reference"):
        differences(machine.install(), machine.here, tmp_path / "nothing")
