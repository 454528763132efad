"""Run a part of the test suite: `python -m scripts.suite PART [PYTEST ARGUMENTS]`.

Every test is in one of `test`, `test-rest` and `test-release`; `test` begins with `quick`. Tests that need
neither a server nor the simulated Ascend run two at a time, the others one by one: a server uses both of two
cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

TWO_AT_A_TIME = ("-n", "2", "--dist", "loadscope")
HEAVY = "server or simulator"
LIGHT = f"not ({HEAVY} or thorough or release)"
QUICK = ("-m", f"{LIGHT} and not slow", *TWO_AT_A_TIME)
SLOW = ("-m", f"{LIGHT} and slow", *TWO_AT_A_TIME)

# Part of the suite: what pytest is called with, one after the other.
PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "quick": (QUICK,),
    "test": (QUICK, ("-m", f"({HEAVY}) and not (thorough or release)")),
    "test-rest": (SLOW, ("-m", "thorough and not release")),
    "test-release": (("-m", "release"),),
}


def run(part: str, arguments: Sequence[str] = ()) -> int:
    """Exit status: that of the first run that fails; `arguments` have to select tests of one of them."""
    # Hundreds of processes import our modules; where they may not keep them compiled, that is minutes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    statuses = []
    for selection in PARTS[part]:
        command = [sys.executable, "-m", "pytest", *selection, "--durations=25", *arguments]
        print("+", *command, flush=True)
        statuses.append(subprocess.run(command, env=environment, check=False).returncode)
        if statuses[-1] == pytest.ExitCode.INTERRUPTED:
            break
    selected = [status for status in statuses if status != pytest.ExitCode.NO_TESTS_COLLECTED]
    return next((status for status in selected if status), 0) if selected else statuses[0]


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in PARTS:
        print(f"{__doc__}\nPART is one of {', '.join(PARTS)}", file=sys.stderr)
        return 2
    return run(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
