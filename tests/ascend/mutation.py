"""Take a rule out of the code under test, in a rank's process, and put it back.

A test that guards a rule is only worth something if it fails without the rule. `Rule` names a piece of
one function; `broken` replaces it while a scenario runs.
"""

from __future__ import annotations

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any


@dataclass(frozen=True)
class Rule:
    """`text`, which stands exactly once in `function` of `module`, is what makes the rule hold."""

    name: str
    module: str
    function: str
    text: str
    replacement: str = "pass"

    def __str__(self) -> str:
        return self.name


@contextmanager
def broken(rule: Rule | None) -> Iterator[None]:
    """The function without the rule; None leaves everything as it is."""
    if rule is None:
        yield
        return
    function = _find(rule)
    original = function.__code__
    function.__code__ = _compile_without(rule, function).__code__
    try:
        yield
    finally:
        function.__code__ = original


def _find(rule: Rule) -> FunctionType:
    found: Any = importlib.import_module(rule.module)
    for name in rule.function.split("."):
        found = getattr(found, name)
    assert isinstance(found, FunctionType), f"{rule.function} is not a plain function"
    return found


def _compile_without(rule: Rule, function: FunctionType) -> FunctionType:
    source = textwrap.dedent(inspect.getsource(function))
    count = source.count(rule.text)
    assert count == 1, (
        f"{rule.text!r} stands {count} times in {rule.function}: the rule's text is out of date"
    )
    changed = "from __future__ import annotations\n" + source.replace(rule.text, rule.replacement)
    namespace: dict[str, Any] = {}
    exec(compile(changed, f"<{rule.function} without {rule.name}>", "exec"), function.__globals__, namespace)
    (mutant,) = (value for value in namespace.values() if isinstance(value, FunctionType))
    return mutant
