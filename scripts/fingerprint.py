"""Write patches/contracts.json: fingerprints of the upstream functions that our patches rely on.

    python scripts/fingerprint.py 0.5.21 0.5.23        # downloads the wheels of these releases
    python scripts/fingerprint.py --show               # which releases differ, and where

The wheels are read, never imported or installed. A target that a release does not have is left out of
its contract, and a patch that needs it will refuse that release.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sglang_npu_pp.patches import PATCHES
from sglang_npu_pp.patching import contract_targets, fingerprint_in_file

CONTRACTS = Path(__file__).resolve().parent.parent / "patches" / "contracts.json"


def download(release: str, directory: Path) -> Path:
    """The wheel of an SGLang release, from the configured package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "-d", str(directory), f"sglang=={release}"], check=True)
    return next(directory.glob(f"sglang-{release}-*.whl"))


def read_contract(wheel: Path) -> dict[str, str]:
    """Target -> fingerprint for one wheel."""
    contract = {}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        sources: dict[str, str] = {}
        for target in contract_targets(PATCHES):
            module, _, qualname = target.partition(":")
            name = module.replace(".", "/") + ".py"
            if name not in names:
                continue
            if name not in sources:
                sources[name] = archive.read(name).decode()
            found = fingerprint_in_file(sources[name], qualname)
            if found is not None:
                contract[target] = found
    return contract


def show(contracts: dict[str, dict[str, str]]) -> None:
    """A line a target: the fingerprint in each release, so that a reader sees what changed when."""
    releases = sorted(contracts)
    print("  ".join(release.ljust(16) for release in releases))
    for target in sorted({target for contract in contracts.values() for target in contract}):
        prints = [contracts[release].get(target, "-") for release in releases]
        mark = " " if len(set(prints)) == 1 else "*"
        print("  ".join(text.ljust(16) for text in prints), mark, target.rpartition(".srt.")[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("releases", nargs="*", help="SGLang releases to (re)fingerprint")
    parser.add_argument("--show", action="store_true", help="print the contracts")
    arguments = parser.parse_args()
    contracts = json.loads(CONTRACTS.read_text()) if CONTRACTS.exists() else {}
    for release in arguments.releases:
        with tempfile.TemporaryDirectory() as directory:
            contracts[release] = read_contract(download(release, Path(directory)))
        print(f"{release}: {len(contracts[release])} of {len(contract_targets(PATCHES))} targets")
    if arguments.releases:
        CONTRACTS.write_text(json.dumps(contracts, indent=1, sort_keys=True) + "\n")
    if arguments.show:
        show(contracts)


if __name__ == "__main__":
    main()
