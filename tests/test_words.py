"""Docstrings are short, and retired words stay out of names, docstrings and documents."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIMIT = 95.0  # docstring words per 100 lines; pyzmq has 96
RETIRED = {
    "card": "endpoint",
    "doorkeeper": "connection monitor",
    "greet": "handshake",
    "inhand": "canned response",
    "nobody": "no process, no client, none",
    "patience": "retry policy",
    "stranger": "unauthenticated client",
    "strangers": "unauthenticated clients",
    "teller": "deferred post",
    "toldclock": "shared clock",
    "whoever": "the client, the sender, the caller",
}
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def modules() -> list[Path]:
    """Package and patches, the latter once."""
    paths = sorted([*(ROOT / "sglang_npu_pp").rglob("*.py"), *(ROOT / "patches").rglob("*.py")])
    return [path for path in paths if ROOT / "sglang_npu_pp/patches" not in path.parents]


def docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def identifiers(source: str) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.string


def words_of_name(name: str) -> list[str]:
    """In lower case: the parts of snake_case, each also cut at capital letters."""
    parts = [part for part in name.split("_") if part]
    humps = re.findall(r"[A-Z][a-z]+|[a-z]+", name)
    return [word.lower() for word in (*parts, *humps)]


def retired(words: set[str]) -> list[str]:
    return [f"{word}: say {RETIRED[word]}" for word in sorted(words & set(RETIRED))]


def test_docstrings_of_package_and_patches_are_short() -> None:
    sources = [path.read_text() for path in modules()]
    words = sum(len(text.split()) for source in sources for text in docstrings(source))
    lines = sum(len(source.splitlines()) for source in sources)
    assert 100 * words / lines <= LIMIT, f"{words} words of docstrings in {lines} lines"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_code_has_no_retired_word(path: Path) -> None:
    source = path.read_text()
    found = {word for name in identifiers(source) for word in words_of_name(name)}
    found.update(re.findall(r"[a-z]+", " ".join(docstrings(source)).lower()))
    assert retired(found) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_have_no_retired_word(path: Path) -> None:
    assert retired(set(re.findall(r"[a-z]+", path.read_text().lower()))) == []


def test_a_retired_word_is_found_in_every_kind_of_name() -> None:
    assert "stranger" in words_of_name("_StrangerCount")
    assert "inhand" in words_of_name("_InHand")
    assert "patience" in words_of_name("MAX_PATIENCE_S")
    assert retired({"card", "endpoint"}) == ["card: say endpoint"]
