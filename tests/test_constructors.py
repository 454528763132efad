"""No constructor of the package or of a patch has more than six parameters.

What is written as a class with fields only, a dataclass, a NamedTuple or a message of msgspec, is data and
has as many fields as it has: no constructor is written for it, so none is found here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import sglang_npu_pp

MOST = 6
PACKAGE = Path(sglang_npu_pp.__path__[0])


def constructors(source: str) -> Iterator[tuple[str, int]]:
    """Class and number of parameters, `self` not among them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                if isinstance(each, ast.FunctionDef) and each.name == "__init__":
                    given = each.args
                    yield node.name, len([*given.posonlyargs, *given.args, *given.kwonlyargs]) - 1


def test_no_constructor_has_more_than_six_parameters() -> None:
    found = {
        f"{path.relative_to(PACKAGE)} {name}": count
        for folder in (PACKAGE, PACKAGE / "patches")
        for path in folder.rglob("*.py")
        for name, count in constructors(path.read_text())
    }
    assert any(key.startswith("patches/pipeline.py") for key in found), "patches/ is a link: it is not walked"
    assert {key: count for key, count in found.items() if count > MOST} == {}


def test_a_constructor_that_takes_more_is_found() -> None:
    source = "class Data:\n    a: int\nclass Worker:\n    def __init__(self, a, b, /, c, *, d=1, e=2): ..."
    assert list(constructors(source)) == [("Worker", 5)]
