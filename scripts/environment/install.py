"""Install what a lock says.

    python -m scripts.environment.install venv              the environment of this Python
    python -m scripts.environment.install PART...           parts beside it (requirements/PART.in)
    python -m scripts.environment.install --suite           the parts that the test suite uses

Does nothing where it has been done. A part without which some tests are skipped may be missing: that is said,
and the others are installed all the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping

from scripts.environment import installer
from scripts.environment.parts import LOCKS, VENV, PartError, parts, provide

SUITE = (
    *("sglang-0.5.13.post1", "sglang-0.5.15", "sglang-0.5.18", "sglang-0.5.23"),
    *("accuracy", "ascend_sim", "mooncake"),
)
MAY_BE_MISSING: Mapping[str, str] = {
    "ascend_sim": "what runs on the simulated Ascend cannot be used",
    "mooncake": "what moves a KV cache between servers cannot be used",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{VENV}, or a part: {', '.join(parts())}")
    parser.add_argument("--suite", action="store_true", help=f"the same as {' '.join(SUITE)}")
    options = parser.parse_args()
    try:
        for name in [*options.names, *(SUITE if options.suite else ())]:
            install(name)
    except (PartError, installer.InstallerError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    return 0


def install(name: str) -> None:
    if name == VENV:
        installer.sync(LOCKS / f"{VENV}.txt")
        return
    part = parts().get(name)
    if part is not None and part.is_installed:
        return
    started = time.monotonic()
    print(f"  {name + ', beside .venv':<42}", end="", flush=True)
    try:
        provide(name)
    except PartError as error:
        print("failed")
        if name not in MAY_BE_MISSING:
            raise
        print(f"{error}\n{MAY_BE_MISSING[name]}.")
        return
    print(f"{time.monotonic() - started:4.0f} s")


if __name__ == "__main__":
    sys.exit(main())
