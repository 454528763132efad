"""Import of torch for tools, without device backends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"


@contextmanager
def without_device_backends() -> Iterator[None]:
    """Around an import of torch: without torch_npu, which fails where CANN is missing or broken.

    No effect if torch is imported already, nor on child processes.
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
