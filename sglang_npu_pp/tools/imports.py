"""How tools import torch: without its device backends."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


def import_without_devices(name: str) -> ModuleType:
    """Import a module that imports torch, without torch loading torch_npu on the way.

    Where CANN is missing or broken that would fail, and a tool should say so instead. Nothing changes for a
    process that has imported torch already, nor for those that it starts.
    """
    before = os.environ.get(_AUTOLOAD)
    os.environ[_AUTOLOAD] = "0"
    try:
        return importlib.import_module(name)
    finally:
        if before is None:
            del os.environ[_AUTOLOAD]
        else:
            os.environ[_AUTOLOAD] = before
