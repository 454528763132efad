"""Small folders and wheels in the place of SGLang's releases."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

Modules = Mapping[str, str]
"""Name without the package -> text."""


def write_folder(folder: Path, release: str, modules: Modules) -> Path:
    """A folder that holds `sglang/`."""
    package = folder / "sglang"
    package.mkdir(parents=True)
    (package / "_version.py").write_text(f"version: str\n__version__ = version = '{release}'\n")
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)
    return folder


def write_wheel(folder: Path, release: str, modules: Modules) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"sglang-{release}-cp311-cp311-manylinux_2_34_x86_64.whl"
    information = f"sglang-{release}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in modules.items():
            wheel.writestr(f"sglang/{name}.py", text)
        wheel.writestr(
            f"{information}/METADATA", f"Metadata-Version: 2.1\nName: sglang\nVersion: {release}\n"
        )
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nTag: cp311-cp311-manylinux_2_34_x86_64\n")
        wheel.writestr(f"{information}/RECORD", "")
    return path
