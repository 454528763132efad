"""Parts beside .venv: installed on demand, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scripts.environment import install, parts
from scripts.environment.parts import Part, PartError

from .wheels import make_wheel


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """The only one there is, `small`: a package of a few bytes in a folder that pip looks into."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    requirements, locks = tmp_path / "requirements", tmp_path / "requirements" / "lock"
    locks.mkdir(parents=True)
    digest = make_wheel(tmp_path / "index", "alpha", "1.0")
    (requirements / "small.in").write_text("alpha\n")
    (locks / "small.txt").write_text(f"alpha==1.0 \\\n    --hash={digest}\n")
    monkeypatch.setattr(parts, "LOCKS", locks)
    monkeypatch.setattr(parts, "BESIDE", tmp_path / "beside")
    monkeypatch.setattr(parts, "parts", lambda: {"small": Part("small")})
    monkeypatch.setattr(install, "parts", parts.parts)
    return Part("small")


def test_a_part_is_installed_once(part: Part) -> None:
    assert not part.is_installed
    parts.provide("small")
    assert part.is_installed
    assert (part.folder / "alpha.py").is_file()
    (part.folder / "mark").touch()
    parts.provide("small")
    assert (part.folder / "mark").is_file(), "it was made again"


def test_a_part_whose_lock_has_changed_is_made_again(part: Part, tmp_path: Path) -> None:
    parts.provide("small")
    digest = make_wheel(tmp_path / "index", "beta", "1.0")
    part.lock.write_text(f"beta==1.0 \\\n    --hash={digest}\n")
    assert not part.is_installed
    parts.provide("small")
    assert (part.folder / "beta.py").is_file()
    assert not (part.folder / "alpha.py").exists()


def test_a_part_that_cannot_be_installed_is_one_sentence_and_leaves_nothing(
    part: Part, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "index").mkdir()
    with pytest.raises(
        PartError, match=r"^small could not be installed \(.*alpha.*\); check the package index"
    ):
        parts.provide("small")
    assert not part.is_installed
    assert list((tmp_path / "beside").glob("*")) == []


def test_a_part_that_is_half_there_is_none(part: Part) -> None:
    part.folder.mkdir(parents=True)
    assert not part.is_installed
    parts.provide("small")
    assert part.is_installed


def test_a_part_that_does_not_exist_is_named() -> None:
    with pytest.raises(PartError, match="there is no part nothing; the parts are accuracy, ascend_sim, "):
        parts.provide("nothing")


def test_a_part_that_may_be_missing_does_not_keep_others_away(
    part: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(tmp_path / "index", tmp_path / "elsewhere")
    monkeypatch.setattr("sys.argv", ["install", "small"])
    assert install.main() == 1
    assert "setup: small could not be installed" in capsys.readouterr().err
    monkeypatch.setattr(install, "MAY_BE_MISSING", {"small": "what needs it cannot be used"})
    assert install.main() == 0
    assert "what needs it cannot be used." in capsys.readouterr().out
