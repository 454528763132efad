"""Every test of pipeline parallelism that SGLang has is stood for here, and can be run by its name."""

from __future__ import annotations

import pytest

from .named_cases import shown
from .upstream_cases import CASES, ELSEWHERE, upstream_case


def test_every_case_has_a_test(pytestconfig: pytest.Config, collected: list[pytest.Item]) -> None:
    """Looks at what pytest has collected: skipped where that is only a part of the suite."""
    assert CASES.keys() == shown("upstream_case", pytestconfig, collected)


def test_no_case_is_both_here_and_elsewhere() -> None:
    assert not CASES.keys() & ELSEWHERE.keys()


def test_a_case_that_is_not_in_the_list_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\['TestPP'\] are not in the list"):
        upstream_case("TestPP")
