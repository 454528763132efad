"""A real uv installs exactly what a lock says, from where pip is told to look."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pip
import pytest

from scripts.environment import installer
from scripts.environment.parts import ROOT

from .wheels import make_wheel

pytestmark = pytest.mark.slow

LIMIT_S = 120


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which pip looks for packages, and nowhere else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_a_folder_gets_what_the_lock_says(index: Path, tmp_path: Path) -> None:
    digest = make_wheel(index, "alpha", "1.0", ["beta"])
    make_wheel(index, "alpha", "2.0")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"alpha==1.0 \\\n    --hash={digest}\n    # via -r wanted.in\n")
    installer.install_into(tmp_path / "site", lock)
    assert (tmp_path / "site" / "alpha.py").is_file()
    assert list((tmp_path / "site" / "__pycache__").glob("alpha.*.pyc")), "compiled ahead"
    assert [path.name for path in (tmp_path / "site").glob("*.dist-info")] == ["alpha-1.0.dist-info"]


def test_a_file_with_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "alpha", "1.0")
    lock = tmp_path / "lock.txt"
    lock.write_text(f"alpha==1.0 \\\n    --hash=sha256:{'0' * 64}\n")
    with pytest.raises(installer.InstallerError, match="(?i)hash"):
        installer.install_into(tmp_path / "site", lock)


def test_an_environment_becomes_what_the_lock_says(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is missing comes, what has another version is replaced, and what is too much goes."""
    for version in ("1.0", "2.0"):
        make_wheel(index, "alpha", version)
    make_wheel(index, "beta", "1.0")
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    (tmp_path / "pip").symlink_to(
        Path(pip.__file__).parent
    )  # reads pip's settings, and is no part of the lock
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for pins in (["alpha==1.0", "beta==1.0"], ["alpha==2.0"]):
        lock = tmp_path / "lock.txt"
        lock.write_text("\n".join(pins) + "\n")
        program = "from pathlib import Path; from scripts.environment import installer"
        run(python, "-c", f"{program}; installer.sync(Path({str(lock)!r}))")
        site = tmp_path / "venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
        there = {path.name.removesuffix(".dist-info").replace("-", "==") for path in site.glob("*.dist-info")}
        assert there == set(pins)


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- where packages come from ----------------------------------------------------------------------


def test_pips_settings_become_uvs(tmp_path: Path) -> None:
    """As pip reads them: files, then variables."""
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://one.invalid/simple\nextra-index-url =\n    file:///a/simple\n"
        "    https://two.invalid/simple\nfind-links = /wheels /more\ntrusted-host = one.invalid\n"
        "timeout = 7\n[install]\ntimeout = 8\n[list]\ntimeout = 9\n"
    )
    pip = {
        "PIP_CONFIG_FILE": str(config),
        "PIP_CERT": "/its/own.pem",
        "PATH": "/usr/bin",
        "HOME": str(tmp_path),
    }
    found = installer.settings(pip)
    assert found["UV_DEFAULT_INDEX"] == "https://one.invalid/simple"
    assert found["UV_INDEX"] == "file:///a/simple https://two.invalid/simple"
    assert found["UV_FIND_LINKS"] == "/wheels,/more"
    assert found["UV_INSECURE_HOST"] == "one.invalid"
    assert found["SSL_CERT_FILE"] == "/its/own.pem"
    assert found["UV_HTTP_TIMEOUT"] == "8"
    assert installer.settings({**pip, "PIP_DEFAULT_TIMEOUT": "10"})["UV_HTTP_TIMEOUT"] == "10"


def test_what_uv_is_told_itself_is_not_overruled() -> None:
    environ = {
        "PIP_FIND_LINKS": "/of/pip",
        "UV_FIND_LINKS": "/of/uv",
        "UV_LINK_MODE": "symlink",
        "PATH": "/usr/bin",
    }
    found = installer.settings(environ)
    assert (found["UV_FIND_LINKS"], found["UV_LINK_MODE"]) == ("/of/uv", "symlink")


def test_pytorchs_page_is_asked_only_where_no_index_has_the_cpu_build(index: Path, tmp_path: Path) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("torch==9.9.0+cpu \\\n    # via sglang\n")
    before = installer.settings()
    asked = installer.with_cpu_torch(before, lock)["UV_FIND_LINKS"]
    assert asked == f"{index},{installer.CPU_TORCH}"
    make_wheel(index, "torch", "9.9.0+cpu")
    assert installer.with_cpu_torch(before, lock) == before
    lock.write_text("alpha==1.0\n")
    assert installer.with_cpu_torch({"UV_OFFLINE": "1"}, lock) == {"UV_OFFLINE": "1"}


def test_an_installer_that_takes_too_long_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "uv"
    slow.write_text("#!/bin/sh\nexec sleep 30\n")
    slow.chmod(0o755)
    monkeypatch.setattr(installer, "UV", slow)
    monkeypatch.setattr(installer, "LIMIT_S", 0.2)
    with pytest.raises(installer.InstallerError, match="had not finished after 0.2 s"):
        installer.uv("pip", "list", environ={"PATH": "/usr/bin:/bin"})


def test_uv_is_the_one_that_is_locked() -> None:
    (line,) = [line for line in installer.UV_LOCK.read_text().splitlines() if line.startswith("uv==")]
    assert installer.uv("--version").split()[1] == line.split()[0].removeprefix("uv==")


def test_where_the_cpu_build_of_torch_was_looked_for_is_said(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.mkdir()
    lock = tmp_path / "lock.txt"
    lock.write_text("torch==9.9.0+cpu\n")
    monkeypatch.setattr(installer, "CPU_TORCH", "http://127.0.0.1:9/torch/")
    with pytest.raises(
        installer.InstallerError, match=r"^No package index of this machine has the CPU build"
    ):
        installer.sync(lock)
