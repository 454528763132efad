"""Texts of releases: from a folder, from a wheel, or downloaded by pip from a folder of small wheels."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sglang_npu_pp.tools.certify import releases
from sglang_npu_pp.tools.certify.releases import FolderTexts, NoTextError, Releases, WheelTexts, fetch, given

from .wheels import write_folder, write_wheel

pytestmark = pytest.mark.slow

MODULES = {"server": "def serve(): ...\n"}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for all the packages there are."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_a_folder_says_which_release_it_is(tmp_path: Path) -> None:
    texts = given(write_folder(tmp_path, "1.0.post1", MODULES))
    assert texts.release == "1.0.post1"
    assert texts.module("sglang.server") == MODULES["server"]
    assert texts.module("sglang.other") is None
    assert FolderTexts(tmp_path, "another name").release == "another name"


def test_an_installation_without_a_version_file_is_named_by_its_metadata(tmp_path: Path) -> None:
    write_folder(tmp_path, "1.0", MODULES)
    (tmp_path / "sglang" / "_version.py").unlink()
    assert given(tmp_path).release == "of an unknown release"
    (tmp_path / "sglang-0.5.13.post1.dist-info").mkdir()
    assert given(tmp_path).release == "0.5.13.post1"


def test_the_installed_sglang_says_which_it_is() -> None:
    import sglang

    assert sglang.__file__
    assert given(Path(sglang.__file__).parents[1]).release == sglang.__version__


def test_a_wheel_stays_packed(tmp_path: Path) -> None:
    wheel = write_wheel(tmp_path, "1.0", MODULES)
    texts = given(wheel)
    assert texts.release == "1.0"
    assert texts.module("sglang.server") == MODULES["server"]
    assert texts.module("sglang.other") is None
    assert list(tmp_path.iterdir()) == [wheel]


def test_what_is_no_reference_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(NoTextError, match=r"neither a wheel of SGLang nor a folder that holds sglang/\.$"):
        given(tmp_path)
    broken = tmp_path / "sglang-1.0-py3-none-any.whl"
    broken.write_bytes(b"no zip")
    with pytest.raises(NoTextError, match="is not a wheel that can be read"):
        given(broken)


def test_a_release_is_downloaded_once(tmp_path: Path, index: Path) -> None:
    wheel = write_wheel(index, "1.0", MODULES)
    cache = tmp_path / "cache"
    fetched = fetch("1.0", cache)
    assert fetched.parent == cache
    wheel.unlink()
    assert fetch("1.0", cache) == fetched
    assert list(cache.iterdir()) == [fetched]
    assert WheelTexts(fetched).release == "1.0"


def test_a_damaged_wheel_in_the_cache_is_downloaded_again(tmp_path: Path, index: Path) -> None:
    name = write_wheel(index, "1.0", MODULES).name
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / name).write_bytes(b"half of it")
    assert WheelTexts(fetch("1.0", cache)).module("sglang.server") == MODULES["server"]


def test_what_pip_cannot_find_is_said_in_its_words(tmp_path: Path, index: Path) -> None:
    with pytest.raises(NoTextError, match=r"^pip cannot download SGLang 1\.0 \(.*No matching distribution"):
        fetch("1.0", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_distribution_is_never_built(tmp_path: Path, index: Path) -> None:
    (index / "sglang-1.0.tar.gz").write_bytes(b"would run setup.py")
    with pytest.raises(NoTextError, match="No matching distribution"):
        fetch("1.0", tmp_path / "cache")


def test_pip_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec cat /dev/zero >/dev/null\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(NoTextError, match=r"^pip did not download SGLang 1\.0 within 0\.2 s\.$"):
        fetch("1.0", tmp_path / "cache", limit_s=0.2)


def test_a_cache_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(NoTextError, match=r"^SGLang 1\.0 cannot be kept for comparing \("):
        fetch("1.0", tmp_path / "cache")


def test_a_failure_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(release: str, cache: Path, limit_s: float) -> Path:
        asked.append(release)
        raise NoTextError("no network.")

    monkeypatch.setattr(releases, "fetch", fails)
    found = Releases(None, tmp_path)
    for _ in range(2):
        with pytest.raises(NoTextError, match="no network"):
            found.of("1.0")
    assert asked == ["1.0"]


def test_the_cache_is_the_user_s() -> None:
    assert releases.default_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/sglang-npu-pp/releases")
    assert releases.default_cache({}) == Path.home() / ".cache/sglang-npu-pp/releases"
