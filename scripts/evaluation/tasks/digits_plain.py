"""Functions of the task digits_plain; lmms_eval imports this file by its path."""

from __future__ import annotations

from typing import Any

POST_PROMPT = "\nanswer with a single digit."  # as the model was trained


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [doc["image"].convert("RGB")]


def doc_to_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    return f"{doc['question']}{POST_PROMPT}"


def doc_to_messages(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[dict[str, Any]]:
    pictures = [{"type": "image", "url": picture} for picture in doc_to_visual(doc)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc_to_text(doc)}]}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The whole answer must be the digit: nothing is parsed, nothing is guessed."""
    return {"exact_match": float(results[0] == doc["answer"])}
