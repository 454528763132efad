"""Import of torch for tools: without device backends, or in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
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


def asked_apart(program: str, answer: str, environ: Mapping[str, str], limit_s: float) -> re.Match[str] | str:
    """Match of the pattern `answer` in what the program prints in a Python of its own, or else why there is
    none: its last line of error.

    For what fails or hangs with a broken CANN or driver. Raises subprocess.TimeoutExpired.
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environ, _AUTOLOAD: "0"},
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    found = re.search(answer, done.stdout, re.M)
    if done.returncode or found is None:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return found
