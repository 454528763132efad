"""How tools import torch: without its device backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@contextmanager
def without_device_backends() -> Iterator[None]:
    """Around the import of a module that imports torch: torch does not load torch_npu on the way.

    Where CANN is missing or broken that would fail, and a tool should say so instead. Nothing changes for a
    process that has imported torch already, nor for those that it starts.
    """
    before = os.environ.get(_AUTOLOAD)
    os.environ[_AUTOLOAD] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_AUTOLOAD]
        else:
            os.environ[_AUTOLOAD] = before
