"""Every field case has a test, and can be run by its name."""

from __future__ import annotations

import pytest

from .field_cases import CASES, field_case
from .named_cases import shown


def test_every_case_has_a_test(pytestconfig: pytest.Config, collected: list[pytest.Item]) -> None:
    """Looks at what pytest has collected: skipped where that is only a part of the suite."""
    assert CASES.keys() == shown("field_case", pytestconfig, collected)


def test_a_case_that_is_not_in_the_list_is_refused() -> None:
    with pytest.raises(AssertionError, match=r"\['sglang-1'\] are not in the list"):
        field_case("sglang-1")
