"""The installed SGLang, read from its files, for tools where SGLang does not start."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

from sglang_npu_pp.errors import ContractError
from sglang_npu_pp.fingerprints import fingerprint_on_disk

PLUGIN_GROUP = "sglang.srt.plugins"
"""Entry-point group whose plugins SGLang loads."""

ONLY_PLUGINS = "SGLANG_PLUGINS"
"""Environment variable: if it is set, SGLang loads only the plugins it names, separated by commas."""


def folder() -> Path:
    """The package's folder. Raises ContractError if SGLang is not installed."""
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        raise ContractError(
            "SGLang is not installed for this Python; install it, or use the Python that has it."
        )
    return Path(next(iter(found.submodule_search_locations)))


def release() -> str:
    """Value of `sglang.version.__version__`. Raises ContractError if SGLang is not installed."""
    written = folder() / "_version.py"
    match = re.search(r"^__version__.* = '(.+)'$", written.read_text(), re.M) if written.exists() else None
    return match[1] if match else importlib.metadata.version("sglang")


def fingerprint(target: str) -> str | None:
    """For "module:Class.method", None if absent. Raises ContractError if SGLang is not installed."""
    return fingerprint_on_disk(target, folder())
