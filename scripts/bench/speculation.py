"""Servers that speculate with stages (SGLANG_ENABLE_PP_SPEC), and the same without drafts.

A tiny Llama and an EAGLE draft that is right about half of the time, in a chain of three; attention is
SGLang's that knows drafts, its kernels in plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rig.launcher import ROOT
from rig.speculation import BACKENDS, Models

_BRANCHES = 1  # at each step: a chain, as published command lines have it


def target() -> Path:
    """In .run, which git ignores; its draft lies beside it."""
    folder = ROOT / ".run/bench_speculation"
    return _models(folder / "target").target if (folder / "draft/config.json").is_file() else _write(folder)


def arguments(target: Path, drafts: bool) -> tuple[str, ...]:
    return _models(target).arguments(_BRANCHES) if drafts else BACKENDS


def variables(drafts: bool) -> Mapping[str, str]:
    return {"SGLANG_ENABLE_PP_SPEC": "1"} if drafts else {}


def _models(target: Path) -> Models:
    return Models(target, target.with_name("draft"))


def _write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return Models.written(folder).target
