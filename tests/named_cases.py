"""Cases that tests carry by name, as marks: each list has a kind of its own (tests/conftest.py)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest


def mark_of(kind: str, cases: Mapping[str, str], listed: str, names: Iterable[str]) -> pytest.MarkDecorator:
    """Of a test that shows these cases; `listed` says in an error what `cases` is."""
    names = tuple(names)
    unknown = set(names) - cases.keys()
    assert not unknown, f"{sorted(unknown)} are not in the list of {listed}"
    mark: pytest.MarkDecorator = getattr(pytest.mark, kind)(*names)
    return mark


def shown(kind: str, pytestconfig: pytest.Config, collected: Iterable[pytest.Item]) -> set[str]:
    """Names on all tests; skips the test that asks where only a part of the suite was collected."""
    if pytestconfig.args != pytestconfig.getini("testpaths"):
        pytest.skip("only a part of the suite was collected")
    return {name for item in collected for mark in item.iter_markers(kind) for name in mark.args}
