"""Plugin of pytest, for an environment that lacks packages of `.venv`: what needs one of them is skipped.

    python3.12 -m pytest -p tests.without_torch.plugin -m "not (server or simulator)"

Which tests these are is found out by running them: a module that cannot be imported, or a test that fails,
with "No module named ..." of such a package, in this process or in one that it starts. Only modules of tests
that import the package are taken: others are about this repository, and depend on no Python.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TypeVar

import pytest

SITE_VARIABLE = "SITE_OF_VENV"
"""Names the site-packages of `.venv`."""

NOT_FOUND = re.compile(r"No module named '(\w+)")
IMPORTS_THE_PACKAGE = re.compile(r"^\s*(from|import) sglang_npu_pp", re.MULTILINE)

_Report = TypeVar("_Report", pytest.CollectReport, pytest.TestReport)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_of_tests = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    if is_of_tests and not IMPORTS_THE_PACKAGE.search(collection_path.read_text()):
        return True
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return skipped_without_package((yield), collector.path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return skipped_without_package((yield), item.path)


def skipped_without_package(report: _Report, path: Path) -> _Report:
    """The report, or one that says which package is missing."""
    if report.failed:
        said = "\n".join((report.longreprtext, *(text for _, text in report.sections)))
        missing = next((name for name in NOT_FOUND.findall(said) if is_missing(name)), None)
        if missing is not None:
            report.outcome = "skipped"
            report.longrepr = (str(path), 0, f"Skipped: there is no {missing} in this environment")
    return report


def is_missing(name: str) -> bool:
    """Whether a package is one of `.venv`, and none here: what Python itself no longer has is neither."""
    if name == "torch":
        return True
    site = os.environ[SITE_VARIABLE]
    return PathFinder.find_spec(name, [site]) is not None and PathFinder.find_spec(name) is None
