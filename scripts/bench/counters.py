"""What a stage counts while it is measured, in a file that it shares with the benchmark.

One file of doubles a stage, mapped by both sides: the stage adds, the benchmark reads differences, and sets
how long a forward takes. No locks: each field has one writer.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self


@dataclass(frozen=True)
class Counted:
    """Sums since the start of a stage, or differences of two such sums. Times in seconds."""

    launches: float = 0.0  # forwards
    tokens: float = 0.0  # rows of the batches: tokens of prompts, or one a request when decoding
    forward_s: float = 0.0  # wall time of the forwards, padding included, waits for messages excluded
    compute_s: float = 0.0  # the same without padding
    host_cpu_s: float = 0.0  # CPU time of the scheduler thread outside the forwards

    @property
    def by_launch(self) -> Counted:
        """The same for one forward, on average."""
        return Counted(*(getattr(self, name) / max(1.0, self.launches) for name in COUNTED))

    def __sub__(self, earlier: Counted) -> Counted:
        return Counted(*(getattr(self, name) - getattr(earlier, name) for name in COUNTED))


COUNTED = tuple(field.name for field in fields(Counted))
_PAD = len(COUNTED)
_BYTES = 8 * (_PAD + 1)


class StageFile:
    """The shared file of one stage. `create` is the stage's side."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _BYTES)
        self._cells = memoryview(self._map).cast("d")

    @classmethod
    def create(cls, path: Path) -> Self:
        partial = path.with_suffix(".partial")
        partial.write_bytes(bytes(_BYTES))
        partial.replace(path)
        return cls(path)

    def add(self, amounts: Counted) -> None:
        for index, name in enumerate(COUNTED):
            self._cells[index] += getattr(amounts, name)

    def read(self) -> Counted:
        return Counted(*self._cells[:_PAD])

    @property
    def pad_s(self) -> float:
        """A forward takes at least so long."""
        return float(self._cells[_PAD])

    @pad_s.setter
    def pad_s(self, seconds: float) -> None:
        self._cells[_PAD] = seconds


def stage_path(folder: Path, stage: int) -> Path:
    return folder / f"stage{stage}.counters"
