"""certify on this machine: on CPU and on the simulated Ascend, with the tiny model that the package ships.

    scripts/certify.py                                 both, a round each, at most 10 minutes
    scripts/certify.py --devices cpu -- --rounds 2     what follows -- are options of certify

Reports lie in .run/certify-<device>. Ends with 0 when nothing differs on any device.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from rig.devices import DEVICES, DeviceUnavailableError  # noqa: E402

HERE = ("cpu", "npu-sim")
STAGES = 2
SHORT = ("--rounds", "1", "--faults", "--prompts", "16", "--input-tokens", "128", "--output-tokens", "32")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", nargs="+", choices=HERE, default=list(HERE), help="(both)")
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:split])
    codes = [certify(device, arguments[split + 1 :]) for device in options.devices]
    return max(codes)


def certify(device: str, more: list[str]) -> int:
    """Exit code of certify on one device."""
    print(f"== {DEVICES[device].title}", flush=True)
    try:
        environment = DEVICES[device].environment(STAGES)
    except DeviceUnavailableError as error:
        print(f"certify: {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "sglang_npu_pp", "certify", *SHORT]
    command += ["--output", str(ROOT / ".run" / f"certify-{device}"), *more, "--"]
    command += [*DEVICES[device].arguments, "--pp-size", str(STAGES)]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
